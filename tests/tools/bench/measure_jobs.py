"""What the ranks of test_measure.py do, by name."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist

from tetrascope.engine.trainer import StepStats
from tetrascope.tools.bench.measure import Measurement, measure

WARMUP_SECONDS, STEP_SECONDS = 0.3, 0.05


class ScriptedTrainer:
    """A trainer whose steps only take time: the first `slow` ones much, the others little.

    Step n, counted from 1, has n tokens; rank r says that it waited r + n / 100 seconds for data.
    """

    def __init__(self, slow: int) -> None:
        self.slow, self.number = slow, 0
        self.stops: list[int | None] = []
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(train=SimpleNamespace(dtype="float32"))
        self.loader = SimpleNamespace(close=lambda: None)

    def step(self, stop: int | None) -> StepStats:
        self.stops.append(stop)
        self.number += 1
        time.sleep(WARMUP_SECONDS if self.number <= self.slow else STEP_SECONDS)
        wait = dist.get_rank() + self.number / 100
        return StepStats(1.0, 1.0, 1.0, self.number, 1, 0, 1.0, 1.0, 99.0, wait)


def measure_scripted(warmup: int, steps: int) -> tuple[Measurement, list[int | None], int]:
    """The measurement, after which step each was told there are none, and the number of steps announced."""
    trainer = ScriptedTrainer(slow=warmup)
    announced: list[None] = []
    with mock.patch("tetrascope.tools.bench.peak.WINDOW_SECONDS", 0.1):
        measurement = measure(cast("Any", trainer), warmup, steps, lambda: announced.append(None))
    return measurement, trainer.stops, len(announced)
