"""Prepares the micro-batches of the next steps while the current one runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tetrascope.engine.data.collate import MicroBatch, collate
from tetrascope.engine.data.decode.pinned import pinned
from tetrascope.engine.data.decode.workers import DataWorkers
from tetrascope.engine.data.document import ContextPlace, Document
from tetrascope.engine.data.samples import Loaded, Task
from tetrascope.engine.data.vision import encoded_here
from tetrascope.engine.plan import Figures, MicroBatchPlan, Planner, StepPlan, figures
from tetrascope.models.family import Family
from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.pipeline.actions import Schedule


@dataclass(frozen=True)
class StepData:
    """A step's plan and how good it is, this rank's micro-batches, what was wrong (kind, reason) with draws that could
    not be read here, by their place, and the pipeline's schedule."""

    plan: StepPlan
    figures: Figures
    batches: list[MicroBatch]
    failures: dict[int, tuple[str, str]]
    schedule: Schedule


class Loader:
    """Builds `StepData` for consecutive steps, up to `ahead` of them before they are asked for, in a background thread.

    make: gives the function that reads a sample, in each of `workers` processes, or here when there are none. name: of
    a task, in messages. schedules: the pipeline's schedule of a planned step. A rank decodes only samples that it
    encodes some of. One that cannot be read keeps its place, so that no shape changes on any rank, with blank contents;
    the trainer takes its weight away on all ranks.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Task], Loaded]],
        planner: Planner,
        family: Family,
        config: Any,
        mesh: Mesh,
        device: torch.device,
        seed: int,
        workers: int = 0,
        ahead: int = 1,
        name: Callable[[Task], str] = str,
        schedules: Callable[[StepPlan], Schedule] | None = None,
    ) -> None:
        self._planner, self._family, self._config, self._schedules = planner, family, config, schedules
        self._context = ContextPlace.of(mesh)
        self._mesh, self._device, self._seed, self._ahead = mesh, device, seed, ahead
        self._workers: DataWorkers[Task, Loaded] = DataWorkers(make, workers, name)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._coming: deque[tuple[int, Future[StepData]]] = deque()

    def get(self, step: int, stop: int | None) -> StepData:
        """The data of a step; goes on to the steps after it, but not to step `stop` (None: there is no last one)."""
        if not self._coming or self._coming[0][0] != step:
            for _, future in self._coming:
                future.cancel()
            self._coming.clear()
        first = self._coming[-1][0] + 1 if self._coming else step
        for coming in range(first, step + 1 + self._ahead):
            if coming == step or stop is None or coming < stop:
                self._coming.append((coming, self._executor.submit(self._prepare, coming)))
        return self._coming.popleft()[1].result()

    def close(self) -> None:
        """Ends the thread and the worker processes."""
        for _, future in self._coming:
            future.cancel()
        self._workers.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> StepData:
        plan = self._planner.plan(step)
        failures: dict[int, tuple[str, str]] = {}
        micros = plan.micro_batches[self._mesh.index("dp")]
        tasks = {place: task for micro in micros for place, task in self._tasks(plan, micro)}
        documents = {}
        for place, loaded in zip(tasks, self._workers.map(tasks.values()), strict=True):
            if loaded.failure is not None:
                failures[place] = loaded.failure
            documents[place] = self._document(plan, place, loaded)
        batches = []
        for micro in micros:
            batch = collate(
                [documents[place] for place in micro.samples],
                self._family,
                self._config,
                micro.rows,
                self._mesh.size("tp"),
                self._mesh.index("tp"),
                self._mesh.first_stage,
                torch.device("cpu"),
                self._context,
            )
            batches.append(pinned(batch, self._device))
        schedule = () if self._schedules is None else self._schedules(plan)
        return StepData(plan, figures(self._planner, plan), batches, failures, schedule)

    def _tasks(self, plan: StepPlan, micro: MicroBatchPlan) -> list[tuple[int, Task]]:
        """What to read of a micro-batch, by place: pixels only where some of the patch rows are this rank's."""
        mesh, draws = self._mesh, [plan.draws[place] for place in micro.samples]
        media = [self._planner.info(draw).media for draw in draws]
        here = encoded_here(media, self._family, self._config, mesh.size("tp"), mesh.index("tp"), self._context)
        tasks = [Task(d.source, d.sample, mesh.first_stage and h) for d, h in zip(draws, here, strict=True)]
        return list(zip(micro.samples, tasks, strict=True))

    def _document(self, plan: StepPlan, place: int, loaded: Loaded) -> Document:
        """A drawn sample, ready to be packed."""
        draw = plan.draws[place]
        info = self._planner.info(draw)
        weights = loaded.supervised_T.astype(np.float32) * np.float32(plan.token_weight(place))
        if loaded.failure is None:
            key = (self._seed, draw.sample, draw.epoch)
            positions = self._family.positions(self._config, loaded.ids_T, info.media, key)
        else:
            axes = len(self._family.positions(self._config, np.zeros(0, dtype=np.int64), (), (0, 0, 0)))
            positions = np.zeros((axes, info.tokens), dtype=np.int64)
        return Document(loaded.ids_T, positions, weights, info.media, loaded.rows)
