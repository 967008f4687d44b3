"""Layouts with micro-batches and recomputation, and how their schedules are weighed before they are predicted.

Long steps are weighed by part of their micro-batches, chosen evenly, since one steady round of a schedule is like
another: what fills and drains the pipeline counts once, all else as often as there is work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tetrascope.engine.config import BatchSection
from tetrascope.engine.flops import head_forward, training_flops
from tetrascope.engine.modules import trained
from tetrascope.engine.pipeline import COST
from tetrascope.engine.predict import (
    Candidate,
    Hardware,
    MicroBatchShape,
    Model,
    Parts,
    Prepared,
    fixed_schedule,
    parts,
    prepare,
)
from tetrascope.engine.recompute import Recompute
from tetrascope.engine.setup import Blueprint
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.cost_schedule import cost_schedule
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.partition import balanced_split
from tetrascope.parallel.pipeline.simulator import Costs, simulate
from tetrascope.tools.plan.space import FIXED, RECOMPUTE, Pipelining
from tetrascope.tools.plan.workload import MicroBatches, Workload

ROUNDS, LEAST = 3, 16
"""Micro-batches that a step is weighed by, for each stage and in all: its time is then known to about 5 %."""


@dataclass(frozen=True)
class Variant:
    """Everything but the schedule and the cut.

    samples: of every micro-batch of a data-parallel rank. some: micro-batches that it is weighed by, which are one part
    in `scale` of the work; parts: what these cost.
    """

    layout: Layout
    batch: BatchSection
    recompute: Recompute
    samples: MicroBatches
    some: tuple[MicroBatchShape, ...]
    scale: float
    parts: Parts

    def micro_batches(self) -> tuple[MicroBatchShape, ...]:
        """All of them."""
        return tuple(MicroBatchShape.of(infos, self.layout) for infos in self.samples)


@dataclass(frozen=True)
class Weighed:
    """A schedule of a variant, not simulated yet. prepared: for some of its micro-batches.

    bound: seconds that the step takes at least.
    """

    variant: Variant
    pipelining: Pipelining
    candidate: Candidate
    prepared: Prepared

    def __str__(self) -> str:
        again = "" if self.variant.recompute == "none" else f", recompute {self.variant.recompute}"
        return f"{self.variant.layout}, {self.pipelining}, {len(self.variant.samples)} micro-batches{again}"

    @property
    def ideal(self) -> float:
        """Seconds that no schedule and no cut can beat: all work spread evenly, without a bubble."""
        costs = self.prepared.costs
        work = sum(sum(map(sum, table)) for table in (costs.forward, costs.backward_input, costs.backward_weight))
        return self.variant.scale * work / self.variant.layout.pp + self._spans[2]

    @property
    def least_bytes(self) -> tuple[float, ...]:
        """Bytes of activations that each stage holds at least: those of one micro-batch, the heaviest."""
        held, cut = self.prepared.costs.activation_bytes, self.candidate.cut
        if held is None:
            return (0.0,) * self.variant.layout.pp
        return tuple(max(max(held[chunk]) for chunk in cut.chunks(stage)) for stage in range(self.variant.layout.pp))

    @cached_property
    def _spans(self) -> tuple[float, float, float]:
        """Seconds of forward and backward, at least; of filling and draining in it, as a rule; of what comes after.

        A stage cannot work while no micro-batch has reached it yet, nor, where backwards are not made in two parts,
        while the gradient that it computed last still goes down to the first chunk.
        """
        prepared, cut = self.prepared, self.candidate.cut
        forward = np.array(prepared.costs.forward)
        backward = np.array(prepared.costs.backward_input) + np.array(prepared.costs.backward_weight)
        work = (forward + backward).sum(axis=1)
        before_CM = np.cumsum(forward, axis=0) - forward
        if not self.pipelining.split:
            before_CM += np.cumsum(backward, axis=0) - backward
        soonest = before_CM.min(axis=1)
        chunks = [list(cut.chunks(stage)) for stage in range(self.variant.layout.pp)]
        busy = [float(work[held].sum()) for held in chunks]
        ends = [self.variant.scale * own + float(soonest[held[0]]) for own, held in zip(busy, chunks, strict=True)]
        stage = max(range(len(ends)), key=ends.__getitem__)
        # As in 1F1B, where a stage's bubble is the time of a micro-batch on all other stages.
        once = (forward if self.pipelining.split else forward + backward).mean(axis=1)
        edge = float(once.sum() - once[chunks[stage]].sum()) / self.pipelining.virtual_stages
        return ends[stage], edge, prepared.bound - max(busy)

    @property
    def bound(self) -> float:
        return self._spans[0] + self._spans[2]

    def estimate(self) -> tuple[float, tuple[float, ...]]:
        """Seconds of the step, about, and bytes of activations by stage, from a simulation.

        Raises UserError when the schedule cannot be made.
        """
        prepared = self.prepared
        schedule = schedule_of(self.candidate, len(self.variant.some), prepared.costs, prepared.caps, prepared.frozen)
        timeline = simulate(schedule, prepared.costs)
        edge = min(self._spans[1], timeline.makespan - max(timeline.busy))
        makespan = timeline.makespan + (self.variant.scale - 1) * (timeline.makespan - edge)
        return prepared.seconds(makespan), timeline.peak_bytes


class Weights:
    """Makes variants and weighs them."""

    def __init__(self, made: Blueprint, hardware: Hardware, workload: Workload) -> None:
        self.hardware = hardware
        self.model = Model(made.family, made.model_config, made.modules, made.config.train.dtype)
        self.layers: int = made.model_config.decoder.layers
        self.first_least = made.family.first_layers(made.model_config)
        self._cost = workload.cost
        self._extras = _extras(made, workload)
        self._chosen: dict[tuple[int, int], tuple[MicroBatches, float]] = {}
        self._splits: dict[int, list[int]] = {}

    def variants(self, layout: Layout, batch: BatchSection, samples: MicroBatches) -> list[Variant]:
        """With and without recomputation."""
        some, scale = self._some(samples, max(LEAST, ROUNDS * layout.pp))
        shapes = tuple(MicroBatchShape.of(infos, layout) for infos in some)
        found = []
        for recompute in RECOMPUTE:
            made = parts(self.model, layout, recompute, shapes, self.hardware)
            found.append(Variant(layout, batch, recompute, samples, shapes, scale, made))
        return found

    def _some(self, samples: MicroBatches, most: int) -> tuple[MicroBatches, float]:
        """At most so many of the micro-batches, evenly chosen, in their order; and the work of all beside theirs."""
        count = len(samples)
        if count <= most:
            return samples, 1.0
        key = (id(samples), most)
        if key not in self._chosen:
            some = tuple(samples[(2 * i + 1) * count // (2 * most)] for i in range(most))
            self._chosen[key] = (some, self._work(samples) / self._work(some))
        return self._chosen[key]

    def _work(self, samples: MicroBatches) -> float:
        return sum(sum(self._cost(info)) for infos in samples for info in infos)

    def possible(self, layout: Layout, pipelining: Pipelining) -> bool:
        """Whether there are layers for all chunks, and stages for more than one."""
        chunks = layout.pp * pipelining.virtual_stages
        plain = pipelining == FIXED[0]
        return plain if layout.pp == 1 else self.first_least + chunks - 1 <= self.layers

    def weigh(self, variant: Variant, pipelining: Pipelining, counts: Sequence[int] | None = None) -> Weighed:
        """counts: decoder layers of every chunk; None: the cut whose chunks are most alike in FLOPs."""
        if counts is None:
            counts = self.balanced(len(pipelining.place(variant.layout.pp)))
        cut = Cut.of(pipelining.place(variant.layout.pp), counts, pipelining.vision_chunk)
        candidate = Candidate(variant.layout, cut, pipelining.schedule, variant.recompute)
        prepared = prepare(self.model, candidate, variant.some, self.hardware, parts=variant.parts)
        return Weighed(variant, pipelining, candidate, prepared)

    def balanced(self, chunks: int) -> list[int]:
        """The cut whose chunks are most alike in FLOPs."""
        if chunks not in self._splits:
            self._splits[chunks] = balanced_split(self.layers, chunks, *self._extras, self.first_least)
        return list(self._splits[chunks])


def schedule_of(candidate: Candidate, micro_batches: int, costs: Costs, caps: Sequence[float], frozen: int) -> Schedule:
    """The schedule of a candidate, fixed or made from costs.

    The second keeps all stages within the room of the tightest, as `parallel.memory_gib` lets a run do. Raises
    UserError when not even one micro-batch at a time fits in.
    """
    if candidate.schedule != COST:
        return fixed_schedule(candidate, micro_batches, costs, caps, frozen)
    room = [min(caps)] * len(caps)
    return cost_schedule(candidate.cut.placement, micro_batches, costs, room, frozen, candidate.cut.vision_chunk)


def _extras(made: Blueprint, workload: Workload) -> tuple[float, float]:
    """What vision encoder and output head cost, in decoder layers, forward and backward."""
    samples, learning = workload.typical(), trained(made.modules)
    tokens = [info.tokens for info in samples]
    media = [one for info in samples for one in info.media]
    vision, language = training_flops(made.model_config, media, tokens, learning)
    below = learning.vision or learning.adaptor or learning.embeddings or learning.language
    head = head_forward(made.model_config, sum(tokens)) * (1 + learning.embeddings + below)
    layer = (language - head) / made.model_config.decoder.layers
    return vision / layer, head / layer
