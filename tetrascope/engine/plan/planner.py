"""Plans steps: which samples, in which micro-batch, on which data-parallel rank, in which order.

A pure function of data, seed, settings, layout and cursor: the same on every rank with no communication. Which samples
are in a step depends on no layout; where the global batch is counted in tokens, neither does what lies in one pack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tetrascope.engine.config import BatchSection, LossWeighting
from tetrascope.engine.plan.balance import shares, to_ranks
from tetrascope.engine.plan.cost import Cost, CostFn, row_cost
from tetrascope.engine.plan.cursor import Cursor
from tetrascope.engine.plan.packing import Item, pack, pool_target, spread
from tetrascope.engine.plan.sample import SampleInfo
from tetrascope.engine.plan.stream import Draw, Source, Stream
from tetrascope.engine.plan.weights import sample_weight, token_weight
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import Layout


@dataclass(frozen=True)
class MicroBatchPlan:
    """A packed micro-batch: its samples in order, as numbers of the step's draws; the padded length of its rows."""

    samples: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class StepPlan:
    """A step, counted from 0.

    draws: its samples by rising stream position. A sample may be drawn twice, at the border of two epochs or from a
    source that is gone through quickly; positions are unique. supervised: targets of each draw. micro_batches[dp]: the
    micro-batches of a data-parallel rank, in order. epochs: how often each source has been gone through by everything
    up to the step's last draw. after: where the next step goes on.
    """

    step: int
    draws: tuple[Draw, ...]
    supervised: tuple[int, ...]
    loss: LossWeighting
    micro_batches: tuple[tuple[MicroBatchPlan, ...], ...]
    epochs: tuple[float, ...]
    after: Cursor

    def place(self, position: int) -> int:
        """Number of the draw from a stream position: its place in the global batch."""
        return [draw.position for draw in self.draws].index(position)

    def token_weight(self, place: int) -> float:
        """Loss weight of each supervised token of a draw."""
        return token_weight(self.loss, self.supervised[place])

    def weight(self, dropped: frozenset[int] = frozenset()) -> float:
        """Loss weight of the global batch without the dropped draws (places): the exact sum, rounded once."""
        return math.fsum(sample_weight(self.loss, n) for i, n in enumerate(self.supervised) if i not in dropped)

    @property
    def total_weight(self) -> float:
        """Loss weight of the whole global batch."""
        return self.weight()


@dataclass(frozen=True)
class SourceIndex:
    """What is known of a source: its samples, and its part in the mixture (`stream.Source`).

    lengths: tokens of all samples, where they are at hand without asking one sample after the other. blocks: see there.
    """

    name: str
    infos: Sequence[SampleInfo]
    weight: float = 1.0
    shuffle: bool = True
    lengths: np.ndarray | None = None
    blocks: tuple[int, ...] | None = None


class Planner:
    """Plans steps over the sources of a mixture.

    Raises UserError when the batch or its micro-batches do not divide as the layout asks, when a sample is longer
    than a pack, when the global batch cannot give every micro-batch a sample, when it is more than all there is, and
    for what `Stream` refuses.
    """

    def __init__(
        self,
        sources: Sequence[SourceIndex],
        seed: int,
        layout: Layout,
        batch: BatchSection,
        cost: CostFn = row_cost,
    ) -> None:
        self.sources, self.batch, self.cost, self.layout = tuple(sources), batch, cost, layout
        self._per_rank = batch.per_rank(layout.dp)
        self.stream = Stream([Source(s.name, len(s.infos), s.weight, s.shuffle, s.blocks) for s in sources], seed)
        self._check_samples() if batch.pack is None else self._check_tokens(batch.pack)
        self._known = {0: Cursor()}

    @classmethod
    def single(
        cls,
        infos: Sequence[SampleInfo],
        seed: int,
        layout: Layout,
        batch: BatchSection,
        shuffle: bool = True,
        cost: CostFn = row_cost,
    ) -> Planner:
        """A planner over one source."""
        return cls([SourceIndex("data.train", infos, shuffle=shuffle)], seed, layout, batch, cost)

    def info(self, draw: Draw) -> SampleInfo:
        """What is known of a drawn sample."""
        return self.sources[draw.source].infos[draw.sample]

    def resume(self, cursor: Cursor) -> None:
        """Goes on from `StepPlan.after` of an earlier run; what came before is needed no more, nor can be planned."""
        self._known = {cursor.step: cursor}

    def plan(self, step: int) -> StepPlan:
        """The plan of a step. Those of consecutive steps take one step's work each; others may have to plan all steps
        between, from the nearest that is known.

        Raises ValueError for a step before the one that the run was resumed at.
        """
        at = max((known for known in self._known if known <= step), default=None)
        if at is None:
            raise ValueError(f"step {step} lies before step {min(self._known)}, where the plan starts")
        if self.batch.samples is not None:
            return self._by_samples(self._skip(self._known[at], (step - at) * self.batch.samples, step))
        plan = self._by_tokens(self._known[at])
        self._remember(plan.after)
        while plan.step < step:
            plan = self._by_tokens(plan.after)
            self._remember(plan.after)
        return plan

    def _remember(self, cursor: Cursor) -> None:
        """Keeps the first cursor and the newest few."""
        self._known[cursor.step] = cursor
        if len(self._known) > 8:
            del self._known[sorted(self._known)[1]]

    def _skip(self, cursor: Cursor, samples: int, step: int) -> Cursor:
        """The cursor after so many samples more, where samples are counted."""
        fresh = max(0, samples - len(cursor.waiting))
        return Cursor(step, cursor.position + fresh, cursor.waiting[samples:])

    def _by_samples(self, cursor: Cursor) -> StepPlan:
        count = self.batch.samples or 0
        after = self._skip(cursor, count, cursor.step + 1)
        positions = [position for position, _ in cursor.waiting[:count]]
        positions += range(cursor.position, after.position)
        items = [self._item(position, cursor.step) for position in positions]
        packs = spread([item for item, _ in items], self.layout.dp * self._per_rank)
        return self._made(items, packs, after)

    def _by_tokens(self, cursor: Cursor) -> StepPlan:
        packs, capacity = self.batch.packs or 0, self.batch.pack or 0
        items = [self._item(position, since) for position, since in cursor.waiting]
        tokens, position = sum(item.tokens for item, _ in items), cursor.position
        while tokens <= pool_target(packs, capacity):
            items.append(self._item(position, cursor.step))
            tokens += items[-1][0].tokens
            position += 1
        chosen = pack([item for item, _ in items], cursor.step, packs, capacity)
        taken = {number for members in chosen for number in members}
        waiting = tuple((item.position, item.since) for i, (item, _) in enumerate(items) if i not in taken)
        return self._made(items, chosen, Cursor(cursor.step + 1, position, waiting))

    def _item(self, position: int, since: int) -> tuple[Item, Draw]:
        draw = self.stream[position]
        info = self.info(draw)
        return Item(position, since, info.tokens, self.cost(info)), draw

    def _made(self, items: Sequence[tuple[Item, Draw]], packs: Sequence[Sequence[int]], after: Cursor) -> StepPlan:
        """The plan that has these items in these packs."""
        taken = sorted(number for members in packs for number in members)
        places = {number: place for place, number in enumerate(taken)}
        draws = tuple(items[number][1] for number in taken)
        share_I2 = shares([item.cost for item, _ in items], 1)
        costs = [
            Cost(math.fsum(share_I2[list(members), 0]), math.fsum(share_I2[list(members), 1])) for members in packs
        ]
        planned = [
            MicroBatchPlan(tuple(places[i] for i in members), self._rows(sum(items[i][0].tokens for i in members)))
            for members in packs
        ]
        return StepPlan(
            step=after.step - 1,
            draws=draws,
            supervised=tuple(self.info(draw).supervised for draw in draws),
            loss=self.batch.loss,
            micro_batches=tuple(tuple(planned[p] for p in rank) for rank in to_ranks(costs, self.layout.dp)),
            epochs=self.stream.epochs(draws[-1].position + 1),
            after=after,
        )

    @property
    def _unit(self) -> int:
        """What context and sequence parallelism divide token rows by."""
        return self.layout.ring * self.layout.ulysses * self.layout.tp

    def _rows(self, tokens: int) -> int:
        """Token rows, padded to divide."""
        return -(-tokens // self._unit) * self._unit

    def _check_samples(self) -> None:
        samples, bins = self.batch.samples or 0, self.layout.dp * self._per_rank
        if samples < bins:
            raise UserError(
                f"batch.samples: {samples} samples cannot fill {self._per_rank} micro-batches on each of "
                f"{self.layout.dp} data-parallel ranks; use at least {bins}"
            )
        there = sum(source.length for source in self.stream.sources if source.weight)
        if samples > there:
            raise UserError(f"batch.samples: {samples} is more than the {there} samples there are; lower it")

    def _check_tokens(self, capacity: int) -> None:
        if capacity % self._unit:
            layout = self.layout
            axes = {"ring": layout.ring, "ulysses": layout.ulysses, "tp": layout.tp}
            by = " · ".join(f"parallel.{name}={size}" for name, size in axes.items() if size > 1)
            raise UserError(
                f"batch.pack: {capacity} tokens do not divide by {by}, so that a full pack would be padded beyond it; "
                f"use {capacity // self._unit * self._unit or self._unit}"
            )
        there = 0
        for source in (one for one in self.sources if one.weight):
            lengths = source.lengths
            if lengths is None:
                lengths = np.fromiter((info.tokens for info in source.infos), np.int64, len(source.infos))
            there, longest = there + int(lengths.sum()), int(lengths.argmax())
            if lengths[longest] > capacity:
                raise UserError(
                    f"batch.pack: sample {longest} of {source.name} has {lengths[longest]} tokens, more than "
                    f"batch.pack={capacity}; raise batch.pack, make pictures smaller, or remove the sample"
                )
        if self.batch.tokens is not None and self.batch.tokens > there:
            raise UserError(f"batch.tokens: {self.batch.tokens} is more than the {there} tokens there are; lower it")
