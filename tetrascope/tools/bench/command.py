"""`tetrascope bench train CONFIG`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tetrascope.engine.config_file import load_config
from tetrascope.engine.launch import launch, launched, world_from_environment
from tetrascope.engine.setup import Setup, prepare
from tetrascope.engine.trainer import Trainer
from tetrascope.errors import UserError
from tetrascope.tools.bench.measure import measure
from tetrascope.tools.bench.report import record, summarise, table


def bench_train(path: Path, overrides: list[str], warmup: int, steps: int, json_file: Path | None) -> int:
    """Measures the training throughput of a configuration; returns the exit code.

    Starts the ranks that the configuration asks for unless a launcher has. Trains from the configured first weights
    for `warmup` steps and `steps` timed ones and forgets them: checkpoints are neither read nor written. Rank 0
    prints a table and appends a line to `json_file`, or to bench.jsonl in output.dir.

    Raises UserError for whatever `tetrascope train` would refuse, and for a file that cannot be written.
    """
    config = load_config(path, overrides)
    setup = prepare(config, world_from_environment())
    target = json_file or config.output.dir / "bench.jsonl"
    if os.environ.get("RANK", "0") == "0":
        _check_writable(target)
    if not launched():
        into = ["--json", str(json_file)] if json_file else []
        counts = ["--warmup", str(warmup), "--steps", str(steps)]
        return launch(["bench", "train", str(path), *overrides, *counts, *into], setup.layout.world, config)
    trainer = Trainer(setup)
    try:
        trainer.model.load(setup.source(), trainer.optimizer)
        _bench(trainer, path, overrides, warmup, steps, target)
    finally:
        trainer.close()
    return 0


def _check_writable(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.open("a").close()
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); give another file with --json FILE"
        ) from error


def _bench(trainer: Trainer, path: Path, overrides: list[str], warmup: int, steps: int, target: Path) -> None:
    setup = trainer.setup
    console = Console(stderr=True)
    active = dist.get_rank() == 0
    if active:
        console.print(_announcement(trainer, setup), highlight=False, markup=False, soft_wrap=True)
    # Drawn between steps only: a thread that redraws it would run inside what is timed.
    progress = Progress(
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not (active and console.is_terminal),
    )
    with progress:
        task = progress.add_task("steps", total=warmup + steps)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        measurement = measure(trainer, warmup, steps, advance)
    if not active:
        return
    report = summarise(measurement, warmup)
    with target.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record(report, setup, path, overrides, trainer.device)) + "\n")
    Console().print(table(report, setup))
    console.print(f"appended to {target}", highlight=False, markup=False, soft_wrap=True)


def _announcement(trainer: Trainer, setup: Setup) -> str:
    config = setup.config
    return (
        f"{setup.family.name} on {setup.layout}, {trainer.device.type}, {config.train.dtype}, "
        f"threads a rank: {config.train.threads}, attention: {setup.attention[0]}, {len(trainer.data)} samples"
    )
