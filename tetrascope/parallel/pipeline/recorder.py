"""When a stage did what: for traces of real runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tetrascope.parallel.pipeline.actions import Action

Mark = float | torch.cuda.Event
"""A point in time: seconds of this process's clock, or on a GPU an event in the stream."""


@dataclass(frozen=True)
class Measured:
    """An action in seconds from the recorder's start: when the stage was free for it, when what it needs had arrived,
    when it was done."""

    action: Action
    asked: float
    start: float
    end: float


class Recorder:
    """Takes the marks of one step. On a GPU nothing is waited for before `spans` is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._zero = self.mark()
        self._marks: list[tuple[Action, Mark, Mark, Mark]] = []

    def mark(self) -> Mark:
        """Now."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, action: Action, asked: Mark, start: Mark, end: Mark) -> None:
        """An action that was done."""
        self._marks.append((action, asked, start, end))

    def seconds(self, mark: Mark) -> float:
        """From the recorder's start to a mark."""
        if isinstance(mark, float) and isinstance(self._zero, float):
            return mark - self._zero
        if isinstance(mark, torch.cuda.Event) and isinstance(self._zero, torch.cuda.Event):
            mark.synchronize()
            return self._zero.elapsed_time(mark) / 1000
        raise TypeError("marks of a CPU and of a GPU have no time between them")

    @property
    def spans(self) -> list[Measured]:
        """What was recorded, in the order in which it was done."""
        return [Measured(action, *map(self.seconds, marks)) for action, *marks in self._marks]
