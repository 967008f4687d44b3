"""Records the first steps of a run, all ranks on one clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tetrascope.engine.trace.record import PHASES, RankTrace, StepTrace, TracedAction
from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.pipeline.actions import Schedule, to_text
from tetrascope.parallel.pipeline.recorder import Mark, Recorder
from tetrascope.parallel.pipeline.simulator import Costs

WARM_UP = 1
"""Steps that are not recorded: the first one also makes buffers, connections and compiled kernels."""


class Tracer:
    """Records `steps` steps, but for the first of the run, and writes them to a folder on rank 0.

    Each traced step begins with a barrier, which is all the ranks' common zero: they agree to what it takes a barrier
    to let them go. Does nothing, and costs nothing, when `steps` is 0 or all are recorded.
    """

    def __init__(self, steps: int, folder: Path, mesh: Mesh, device: torch.device, vision_chunk: bool) -> None:
        self._left, self._skip, self._folder = steps, WARM_UP, folder
        self._mesh, self._device, self._vision_chunk = mesh, device, vision_chunk
        self._ends: list[Mark] = []
        self.recorder: Recorder | None = None
        """Of the step at hand, None when it is not recorded."""

    def begin(self) -> None:
        """A step begins."""
        self._skip -= 1
        if self._skip >= 0 or not self._left:
            return
        self._left -= 1
        dist.barrier()
        self._ends = []
        self.recorder = Recorder(self._device)

    def mark(self) -> None:
        """The next of `PHASES` has ended."""
        if self.recorder is not None:
            self._ends.append(self.recorder.mark())

    def end(self, step: int, schedule: Schedule, costs: Callable[[], Costs]) -> None:
        """The step has ended, the last of its phases too. costs: of this rank's pipeline, by the machine's profile."""
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return
        self._ends.append(recorder.mark())
        if len(self._ends) != len(PHASES):
            raise RuntimeError(f"a traced step has {len(PHASES)} phases, {len(self._ends)} ended")
        own = RankTrace(
            self._mesh.rank,
            self._mesh.place,
            tuple(recorder.seconds(mark) for mark in self._ends),
            tuple(TracedAction(str(s.action), s.asked, s.start, s.end) for s in recorder.spans),
        )
        everybody = [None] * dist.get_world_size() if self._mesh.rank == 0 else None
        dist.gather_object((own, to_text(schedule), dataclasses.asdict(costs())), everybody)
        if everybody is not None:
            self._write(step, everybody)

    def _write(self, step: int, everybody: Sequence[Any]) -> None:
        ranks = tuple(own for own, _, _ in everybody)
        by_dp = {own.place["dp"]: (text, costs) for own, text, costs in everybody}
        texts, costs = zip(*(by_dp[dp] for dp in sorted(by_dp)), strict=True)
        StepTrace(step, ranks, texts, costs, self._vision_chunk).write(self._folder)
