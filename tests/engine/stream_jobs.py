"""What the ranks of the resume tests do, by name."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from tetrascope.engine.config_file import load_config
from tetrascope.engine.data.loader import StepData
from tetrascope.engine.setup import prepare
from tetrascope.engine.trainer import Trainer


def run_and_end(
    config: Path, overrides: list[str], save_at: int, end_at: int | None, how: str, log: Path, resume: bool
) -> None:
    """Steps with one checkpoint, after step `save_at`; then on into step `end_at`, which nobody finishes.

    how: "kill": the last rank gets SIGKILL; otherwise all ranks just end. Every rank adds to `log`, a line a step, what
    its micro-batches hold: [step, [position, source, sample, epoch] ...], before the step is computed: a run that dies
    in the middle of one has taken samples that count for nothing.
    """
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])))
    trainer.start(resume)
    mesh, get = trainer.mesh, trainer.loader.get

    def watched(step: int, stop: int | None) -> StepData:
        data = get(step, stop)
        if mesh.index("tp") == mesh.index("pp") == 0:
            held = [place for micro in data.plan.micro_batches[mesh.index("dp")] for place in micro.samples]
            draws = [data.plan.draws[place] for place in held]
            rows = [[d.position, *trainer.data.name_of(d.source, d.sample), d.epoch] for d in draws]
            with log.with_name(f"{log.name}.{mesh.rank}").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([step, rows]) + "\n")
        if step == end_at:
            if how == "kill" and mesh.rank == int(os.environ["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            raise _End
        return data

    trainer.loader.get = watched  # type: ignore[method-assign]
    while trainer.step_number < save_at:
        trainer.step(None)
    trainer.save()
    with suppress(_End):
        while end_at is not None:
            trainer.step(None)
    trainer.close()


class _End(Exception):
    """The run goes no further."""
