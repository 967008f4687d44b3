"""What the ranks of the training tests do, by name."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tetrascope.engine.checkpoint import latest_checkpoint
from tetrascope.engine.config_file import load_config
from tetrascope.engine.setup import prepare
from tetrascope.engine.storage import from_rank_0
from tetrascope.engine.trainer import Trainer
from tetrascope.parallel.pipeline import executor
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.program import Instruction, program


def run_steps(config: Path, overrides: list[str], stop_after: int, resume: bool) -> list[dict[str, Any]]:
    """Steps up to number `stop_after`, then a checkpoint; returns what each step reported."""
    setup = prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"]))
    trainer = Trainer(setup)
    trainer.start(resume)
    stats = []
    while trainer.step_number < stop_after:
        stats.append(asdict(trainer.step(stop_after)))
    trainer.save()
    trainer.saved(last=True)
    trainer.close()
    found = latest_checkpoint(trainer.checkpoints)
    return [
        {**s, "checkpoint": str(found), "skipped_names": sorted(skip.reason for skip in trainer.skipped.seen())}
        for s in stats
    ]


def resume_line(config: Path, overrides: list[str]) -> str:
    """What a resumed run says of where it goes on."""
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])))
    line = trainer.start(resume=True)
    trainer.close()
    return line


def see_less(config: Path, overrides: list[str]) -> None:
    """Starts a run in which the last rank finds fewer tokens in a sample than the others."""
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])))
    if int(os.environ["RANK"]) == 1:
        trainer.data.indexes[0].columns["tokens"] = trainer.data.indexes[0].columns["tokens"] - 1
    try:
        trainer.start(resume=False)
    finally:
        trainer.close()


def folder_of_its_own(root: Path) -> str | None:
    """Asks rank 0 about a folder that is another one on every rank."""
    folder = root / os.environ["RANK"]
    folder.mkdir()
    return from_rank_0("step-000001", folder, torch.device("cpu"))


def trace_steps(config: Path, overrides: list[str], steps: int) -> None:
    """A short run of which `steps` steps are recorded."""
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])), trace=steps)
    trainer.start(resume=False)
    while trainer.step_number < steps + 2:
        trainer.step(None)
    trainer.close()


def another_profile(config: Path, overrides: list[str]) -> None:
    """Starts a run in which each rank reads a hardware file of its own."""
    own = [*overrides, f"parallel.hardware={config.parent / os.environ['RANK']}.yaml"]
    trainer = Trainer(prepare(load_config(config, own), int(os.environ["WORLD_SIZE"])))
    try:
        trainer.start(resume=False)
    finally:
        trainer.close()


def programs_made_in_steps(config: Path, overrides: list[str], steps: int) -> tuple[int, int]:
    """How often the executor had to derive what its stage does from a schedule, and how many schedules there were."""
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])))
    trainer.start(resume=False)
    made, seen = 0, set()

    def counted(schedule: Schedule, stage: int) -> tuple[Instruction, ...]:
        nonlocal made
        before = program.cache_info().misses
        found = program(schedule, stage)
        made += program.cache_info().misses - before
        seen.add(schedule)
        return found

    with mock.patch.object(executor, "program", counted):
        for _ in range(steps):
            trainer.step(steps)
    trainer.close()
    return made, len(seen)
