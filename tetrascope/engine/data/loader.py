"""Prepares the micro-batches of the next step while the current one runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tetrascope.engine.data.collate import Document, MicroBatch, collate
from tetrascope.engine.data.dataset import Dataset
from tetrascope.engine.data.files import BadMedia
from tetrascope.engine.plan import Planner, StepPlan
from tetrascope.models.family import Family
from tetrascope.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepData:
    """A step's plan, this rank's micro-batches, and why images could not be decoded here, by draw (its place)."""

    plan: StepPlan
    batches: list[MicroBatch]
    failures: dict[int, str]


class Loader:
    """Builds `StepData` for consecutive steps, one step ahead, in a background thread.

    Only stage 0 decodes images. A sample that cannot be decoded keeps its place, so that no shape changes on any
    rank, with blank pixels; the trainer takes its weight away on all ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        planner: Planner,
        family: Family,
        config: Any,
        mesh: Mesh,
        device: torch.device,
        seed: int,
    ) -> None:
        self._dataset, self._planner, self._family, self._config = dataset, planner, family, config
        self._mesh, self._device, self._seed = mesh, device, seed
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, Future[StepData]] | None = None

    def get(self, step: int, last: bool) -> StepData:
        """The data of a step; starts on the step after it unless this is the last."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._executor.submit(self._prepare, step))
        data = self._next[1].result()
        self._next = None if last else (step + 1, self._executor.submit(self._prepare, step + 1))
        return data

    def close(self) -> None:
        """Stops the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> StepData:
        plan = self._planner.plan(step)
        failures: dict[int, str] = {}
        batches = []
        for micro in plan.micro_batches[self._mesh.index("dp")]:
            documents = [self._document(plan, place, failures) for place in micro.samples]
            batches.append(
                collate(
                    documents,
                    self._family,
                    self._config,
                    micro.rows,
                    self._mesh.size("tp"),
                    self._mesh.index("tp"),
                    self._mesh.first_stage,
                    self._device,
                )
            )
        return StepData(plan, batches, failures)

    def _document(self, plan: StepPlan, place: int, failures: dict[int, str]) -> Document:
        """A drawn sample, ready to be packed; a failure to read its images is noted under its place."""
        number, epoch = plan.draws[place].sample, plan.draws[place].epoch
        sample = self._dataset.samples[number]
        patches = None
        if self._mesh.first_stage and sample.files:
            try:
                patches = np.concatenate(self._dataset.patches(number))
            except BadMedia as error:
                failures[place] = str(error)
                patches = np.zeros((sample.info.patches, self._config.vision.patch_width), dtype=np.float32)
        weights = sample.supervised_T.astype(np.float32) * np.float32(plan.token_weight(place))
        draw = (self._seed, number, epoch)
        positions_AT = self._family.positions(self._config, sample.ids_T, sample.info.media, draw)
        return Document(sample.ids_T, positions_AT, weights, sample.info.media, patches)
