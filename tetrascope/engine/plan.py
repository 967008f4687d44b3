"""The step plan: what happens in a step, decided before it runs.

A pure function of (index, seed, step, layout, batch): the same on every rank with no communication, and for any
layout the same samples in the same step. It reads metadata only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tetrascope.engine.config import BatchSection
from tetrascope.errors import UserError
from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Layout


@dataclass(frozen=True)
class SampleInfo:
    """What the planner knows of a sample: tokens after expansion, supervised ones, and its images and videos."""

    tokens: int
    supervised: int
    media: tuple[Media, ...]

    @property
    def patches(self) -> int:
        return sum(one.patches for one in self.media)

    @property
    def cost(self) -> int:
        """Balance weight: tokens and patches, each a row through its own network."""
        return self.tokens + self.patches


@dataclass(frozen=True)
class MicroBatchPlan:
    """A packed micro-batch: sample numbers in order, and the padded length of the token rows."""

    samples: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class StepPlan:
    """A step: `micro_batches[dp]` are the micro-batches of a data-parallel rank, in order."""

    step: int
    epoch: int
    samples: tuple[int, ...]
    micro_batches: tuple[tuple[MicroBatchPlan, ...], ...]

    def place(self, sample: int) -> int:
        """Position of a sample in the global batch."""
        return self.samples.index(sample)


class Planner:
    """Plans steps over an index of samples.

    Raises UserError when the global batch cannot give every micro-batch a sample.
    """

    def __init__(
        self, infos: Sequence[SampleInfo], seed: int, layout: Layout, batch: BatchSection, shuffle: bool = True
    ) -> None:
        self._infos, self._seed, self._layout, self._batch = infos, seed, layout, batch
        self._shuffled = shuffle
        bins = layout.dp * batch.micro_batches
        if batch.samples < bins:
            raise UserError(
                f"batch.samples: {batch.samples} samples cannot fill {batch.micro_batches} micro-batches on each of "
                f"{layout.dp} data-parallel ranks; use at least {bins}"
            )
        if batch.samples > len(infos):
            raise UserError(f"batch.samples: {batch.samples} is more than the {len(infos)} samples there are; lower it")
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        if not self._shuffled:
            return np.arange(len(self._infos))
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return generator.permutation(len(self._infos))

    @property
    def _steps_per_epoch(self) -> int:
        return len(self._infos) // self._batch.samples

    def _global_batch(self, step: int) -> tuple[int, ...]:
        """Sample numbers of a step: consecutive places of the endless sequence of epochs.

        The last places of an epoch that do not fill a batch are left out, so that no batch holds a sample twice.
        """
        epoch, place = divmod(step, self._steps_per_epoch)
        start = place * self._batch.samples
        return tuple(int(i) for i in self._order(epoch)[start : start + self._batch.samples])

    def plan(self, step: int) -> StepPlan:
        """The plan of a step, counted from 0.

        Samples go, heaviest first, to the lightest micro-batch of any data-parallel rank.
        """
        samples = self._global_batch(step)
        ranks, per_rank = self._layout.dp, self._batch.micro_batches
        bins: list[list[int]] = [[] for _ in range(ranks * per_rank)]
        loads = [0] * len(bins)
        for sample in sorted(samples, key=lambda i: (-self._infos[i].cost, i)):
            lightest = min(range(len(bins)), key=lambda b: (loads[b], len(bins[b]), b))
            bins[lightest].append(sample)
            loads[lightest] += self._infos[sample].cost
        planned = [MicroBatchPlan(tuple(b), self._rows(b)) for b in bins]
        epoch = step // self._steps_per_epoch
        of_ranks = tuple(tuple(planned[r * per_rank : (r + 1) * per_rank]) for r in range(ranks))
        return StepPlan(step, epoch, samples, of_ranks)

    def _rows(self, samples: Sequence[int]) -> int:
        """Token rows padded to what sequence parallelism divides."""
        tokens = sum(self._infos[i].tokens for i in samples)
        return -(-tokens // self._layout.tp) * self._layout.tp
