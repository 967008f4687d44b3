"""A run on one rank: steps, log, checkpoints and interrupts, to the last checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from tetrascope.engine.attention import attention_words
from tetrascope.engine.checkpoint import Outcome as Saved
from tetrascope.engine.metrics import MetricsLog
from tetrascope.engine.modules import summary
from tetrascope.engine.setup import Setup
from tetrascope.engine.trainer import StepStats, Trainer
from tetrascope.errors import UserError

SAID = 10
"""Skipped samples that are named on the terminal at once."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its newest checkpoint, and whether it was interrupted before its last step."""

    checkpoint: Path
    interrupted: bool


class Interrupts:
    """Remembers Ctrl-C and SIGTERM, so that the step at hand can end first."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.seen = True


def train(setup: Setup, resume: bool, after_save: Callable[[Path], None] | None = None, trace: int = 0) -> Outcome:
    """Trains to the configured number of steps, or to an interrupt, and leaves a checkpoint behind.

    after_save: see `Saver`. trace: steps to record into `trace` in output.dir.
    """
    trainer = Trainer(setup, after_save, trace)
    try:
        return _run(trainer, resume)
    finally:
        trainer.close()


def _run(trainer: Trainer, resume: bool) -> Outcome:
    config, setup = trainer.config, trainer.setup
    interrupts = Interrupts()
    origin = trainer.start(resume)
    trainer.saver.prepare(trainer.model, trainer.optimizer)
    steps = config.train.steps
    active = dist.get_rank() == 0
    stop = False
    with MetricsLog(config.output.dir, trainer.step_number, steps, active) as log:
        log.say(
            f"{setup.family.name} on {setup.layout}, {trainer.device.type}, {config.train.dtype}, "
            f"attention: {attention_words(setup.attention[0], config, setup.layout)}, {len(trainer.data)} samples; "
            f"{summary(setup.family.weights(setup.model_config), setup.modules)}; {origin}"
        )
        _say_skipped(log, trainer)
        while trainer.step_number < steps:
            stats = trainer.step(steps)
            step = trainer.step_number
            last = step == steps
            _say_skipped(log, trainer)
            if step % config.train.log_every == 0 or last:
                log.write(step, _log_values(stats))
            stop, saving = _agree([interrupts.seen, trainer.saver.busy], trainer.device)
            if not saving:
                _say_saved(log, trainer.saved())
            if stop or last or step % config.train.save_every == 0:
                _say_saved(log, trainer.save())
                if stop:
                    break
        _say_saved(log, trainer.saved(last=True))
        checkpoint = trainer.checkpoint
        if checkpoint is None:
            raise UserError(f"train.steps: {steps} leaves nothing to do")
        interrupted = stop and trainer.step_number < steps
        if interrupted:
            log.say(f"interrupted: saved {checkpoint}; add --resume to the same command to go on")
        else:
            log.say(f"done: {checkpoint}")
    return Outcome(checkpoint, interrupted)


def _say_saved(log: MetricsLog, outcome: Saved | None) -> None:
    if outcome is not None:
        log.say(outcome.report())


def _say_skipped(log: MetricsLog, trainer: Trainer) -> None:
    """Names what was skipped for the first time; of many at once, as many as can be read."""
    for skip in trainer.news[:SAID]:
        log.say(f"skipped, {len(trainer.skipped)} in all: {skip.reason}")
    if len(trainer.news) > SAID:
        log.say(f"… and {len(trainer.news) - SAID} more; all are in skipped.jsonl")


def _agree(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether any rank has it: all ranks must stop, and hear of a save's end, after the same step."""
    total = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in total.tolist()]


def _log_values(stats: StepStats) -> dict[str, float]:
    return {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.lr,
        "tokens": stats.tokens,
        "images": stats.images,
        "skipped_samples": stats.skipped,
        "tokens_per_second": stats.tokens / stats.seconds,
        "step_seconds": stats.seconds,
        "data_wait_seconds": stats.data_wait,
        "packing_efficiency": stats.packing,
        "decoder_imbalance": stats.decoder_imbalance,
        "vision_imbalance": stats.vision_imbalance,
    }
