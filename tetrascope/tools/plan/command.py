"""`tetrascope plan`: the best layouts for so many GPUs, predicted from the configuration alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from tetrascope.engine.config import Config, ParallelSection
from tetrascope.engine.config_file import load_config
from tetrascope.engine.data.mixture import Mixture
from tetrascope.engine.modules import trained
from tetrascope.engine.plan import CostModel
from tetrascope.engine.predict import Hardware, calibrate, load_hardware, save_hardware
from tetrascope.engine.setup import blueprint, open_data, prepare
from tetrascope.errors import UserError
from tetrascope.tools.data.preview import printable
from tetrascope.tools.data.sources import progress_bar
from tetrascope.tools.plan.choices import left_out, settings, table
from tetrascope.tools.plan.page import page
from tetrascope.tools.plan.search import search
from tetrascope.tools.plan.workload import Mix, Workload
from tetrascope.tools.verify.pool import WorkerPool

FILE_WIDTH = 160
"""Columns of what is not written to a terminal."""


@dataclass(frozen=True)
class Asked:
    """Options of the command; see `tetrascope plan --help`."""

    gpus: int
    hardware: str | None = None
    calibrate: Path | None = None
    top: int = 10
    pick: int = 1
    html: Path | None = None
    images: str | None = None
    text: int | None = None
    image_size: str | None = None
    data: bool = False


def plan(path: Path, overrides: list[str], asked: Asked) -> int:
    """Searches, prints what is best, and writes the page.

    Raises UserError for whatever is wrong with the configuration (its own layout does not count), unknown hardware,
    and when nothing fits.
    """
    if asked.gpus < 1:
        raise UserError(f"--gpus: expected a number of at least 1, not {asked.gpus}")
    config = load_config(path, overrides)
    # The configured layout need not fit what is being asked; a single rank always does.
    single = config.model_copy(update={"parallel": ParallelSection()})
    made = blueprint(single, None)
    hardware = _hardware(asked)
    profile = asked.hardware or str(asked.calibrate)
    mix = Mix.parse(asked.images, asked.text, asked.image_size)
    cost = CostModel(made.model_config, trained(made.modules))
    workload = Workload(made, cost, mix, _data(single) if asked.data else None)
    began = time.perf_counter()
    outcome = search(made, asked.gpus, hardware, workload, asked.top)
    took = time.perf_counter() - began
    if not 1 <= asked.pick <= len(outcome.ranked):
        raise UserError(f"--pick: there are numbers 1 to {len(outcome.ranked)}, not {asked.pick}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    title = f"{made.family.name} on {asked.gpus:,} × {hardware.name}"
    console.print(table(outcome, printable(title)))
    lines = [
        f"samples: {workload}",
        f"{outcome.simulated:,} schedules simulated in {took:.1f} s",
    ]
    for line in [*lines, *(f"left out: {line}" for line in left_out(outcome))]:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    console.print(f"number {asked.pick} in a configuration:", highlight=False)
    console.print(settings(outcome.ranked[asked.pick - 1], profile), highlight=False, markup=False, soft_wrap=True)
    if asked.html is not None:
        _write(asked.html, page(f"Plan: {title}", lines, outcome, asked.pick, hardware, profile))
        console.print(f"wrote {asked.html}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _data(config: Config) -> Mixture:
    with progress_bar() as progress:
        return open_data(prepare(config, None), progress)


def _hardware(asked: Asked) -> Hardware:
    """What is asked for, or what was measured just now."""
    if (asked.hardware is None) == (asked.calibrate is None):
        raise UserError("--hardware, --calibrate: give one of them: a profile, or a file for what is measured here")
    if asked.hardware is not None:
        return load_hardware(asked.hardware)
    file = asked.calibrate or Path()
    if torch.cuda.is_available():
        found = calibrate("cuda")
    else:
        with WorkerPool(size=2) as pool:
            found = pool.run(_measure, world=2)[0]
    save_hardware(found, file)
    return found


def _measure() -> Hardware:
    """On each of two ranks."""
    return calibrate("cpu", dist.group.WORLD)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {file} cannot be written ({error.strerror}); give another file") from error
