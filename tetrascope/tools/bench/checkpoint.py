"""How long a save stops the run: asynchronous against synchronous, one CPU process.

    python -m tetrascope.tools.bench.checkpoint --size 20M --pairs 9

Each pair is one save of either kind of the same state, to the same folder, in turn, so that both meet the same moods of
the machine; a training step lies between them, since a save right after another would find its pages in the cache.
`stall` is how long `Saver.save` keeps the run; the background's own time and the steps beside it are reported too: on
few cores a step that shares them with the writing thread is slower, which is part of the price.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tetrascope.engine.checkpoint import Saver
from tetrascope.engine.config import CheckpointSection
from tetrascope.tools.bench.cases.qwen2_vl import SIZES, bench_case
from tetrascope.tools.bench.compare import our_engine


@dataclass(frozen=True)
class SaveTimes:
    """Seconds, one a pair. wait: of a synchronous save. first, stall: of an asynchronous one, the first and the later
    ones. write: its time in the background. step, step_beside: of a training step, alone and beside the writing.
    bytes: of a checkpoint. parameters: of the model."""

    parameters: int
    bytes: int
    first: float
    wait: list[float]
    stall: list[float]
    write: list[float]
    step: list[float]
    step_beside: list[float]

    @property
    def ratios(self) -> list[float]:
        """Stall over wait, of each pair, ascending."""
        return sorted(a / b for a, b in zip(self.stall, self.wait, strict=True))


def measure(size: str, pairs: int, folder: Path) -> SaveTimes:
    """Saves a model of one of SIZES. Raises UserError for an unknown size. Needs a process group of one rank."""
    case = bench_case(size, "packed")
    model, optimizer, step = our_engine("qwen2_vl", case.config, case.weights, case.documents)
    kinds = {kind: Saver(folder, CheckpointSection(asynchronous=kind, keep_last=1)) for kind in (True, False)}
    number = 0

    def timed_step() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def timed_save(kind: bool) -> float:
        nonlocal number
        number += 1
        began = time.perf_counter()
        kinds[kind].save(number, model, optimizer, {})
        return time.perf_counter() - began

    step(), step()
    kinds[True].prepare(model, optimizer)
    first = timed_save(True)
    kinds[True].collect(last=True)
    times: dict[str, list[float]] = {name: [] for name in ("wait", "stall", "write", "step", "step_beside")}
    for _ in range(pairs):
        times["step"].append(timed_step())
        times["wait"].append(timed_save(False))
        kinds[False].collect(last=True)
        step()
        times["stall"].append(timed_save(True))
        beside = timed_step()
        if kinds[True].busy:  # else it was partly alone
            times["step_beside"].append(beside)
        outcome = kinds[True].collect(last=True)
        times["write"].append(outcome.seconds if outcome else 0.0)
    newest = folder / f"step-{number:06d}"
    size_on_disk = sum(path.stat().st_size for path in newest.iterdir())
    for saver in kinds.values():
        saver.close()
    return SaveTimes(sum(t.numel() for t in case.weights.values()), size_on_disk, first, **times)


def report(times: SaveTimes) -> Table:
    """Medians and ranges."""
    title = f"{times.parameters:,} parameters, {times.bytes / 1e6:.0f} MB, {torch.get_num_threads()} threads"
    table = Table(title=title)
    for column in ("", "median, ms", "range, ms"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "synchronous save": times.wait,
        "asynchronous save: stall": times.stall,
        "… the first one": [times.first],
        "… in the background": times.write,
        "training step alone": times.step,
        "training step beside the writing": times.step_beside,
    }
    for name, seconds in rows.items():
        if seconds:
            low, high = min(seconds) * 1e3, max(seconds) * 1e3
            table.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", f"{low:.1f} to {high:.1f}")
    ratios = times.ratios
    share = f"{statistics.median(ratios):.1%}"
    table.add_row("stall / synchronous save", share, f"{ratios[0]:.1%} to {ratios[-1]:.1%}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time asynchronous against synchronous saves.")
    parser.add_argument("--size", default="20M", choices=list(SIZES))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to save, by default a temporary folder")
    options = parser.parse_args(arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            Console().print(report(measure(options.size, options.pairs, Path(folder))))
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
