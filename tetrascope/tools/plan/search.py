"""The search of `tetrascope plan`: what cannot be, what cannot be fast, and then predictions, the most hopeful first.

A variant is a layout with a size of micro-batches and a choice of recomputation. One queue holds variants by their
ideal time (all work spread evenly, no bubble), schedules of a variant by the time they take at least (the ideal of
their cut, and what fills and drains the pipeline), and simulated ones by their estimated time. The lowest is taken
out, and replaced by what follows it: so nothing is simulated that cannot be among the best, nor more than MOST
schedules. The best are predicted with all of their micro-batches; then the first few get a better cut, and schedules
made from their costs.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from tetrascope.engine.build import check_layout
from tetrascope.engine.predict import Hardware, Prediction, predict, prepare
from tetrascope.engine.setup import Blueprint
from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.partition import check_layers, search_split
from tetrascope.parallel.pipeline.simulator import Costs
from tetrascope.tools.plan.space import FIXED, PLANNED, Pipelining, batches, layouts
from tetrascope.tools.plan.variants import Variant, Weighed, Weights, schedule_of
from tetrascope.tools.plan.workload import Workload

REFINED = 3
"""Variants, the best so far, that get a better cut and schedules made from their costs."""

LEAVES_NODE = "tensor parallelism and Ulysses, whose ranks talk most, would leave the node; not looked at"

PROMISE = 0.99
"""A schedule is simulated if it may take this share of the time of another of the same variant, or less."""

MOST = 400
"""Schedules that are simulated before the best of those is taken, at most; each takes tens of milliseconds."""

TRIES = 60
"""Cuts that are tried for a variant and a schedule, at most."""

LONGEST = 2048
"""Micro-batches times stages of a step that schedules are made for from costs, at most."""


@dataclass(frozen=True)
class Found:
    """A prediction, and what was chosen to get it. costs: those that it was simulated with. room: bytes of activations
    that the tightest stage can hold."""

    variant: Variant
    pipelining: Pipelining
    prediction: Prediction
    costs: Costs
    room: float

    @property
    def seconds(self) -> float:
        return self.prediction.seconds

    @property
    def counts(self) -> tuple[int, ...]:
        """Decoder layers of every chunk."""
        return self.prediction.candidate.cut.counts


@dataclass
class Rejected:
    """Why something cannot be. count: candidates; first: the first of them, in words."""

    reason: str
    first: str
    count: int = 1


@dataclass(frozen=True)
class Excess:
    """A candidate that does not fit: its stage with the largest excess, bytes needed there and bytes there are."""

    name: str
    stage: int
    needed: float
    capacity: float

    def __str__(self) -> str:
        over = (self.needed - self.capacity) / 2**30
        return (
            f"{self.name}: stage {self.stage} needs {self.needed / 2**30:,.1f} GiB of "
            f"{self.capacity / 2**30:,.1f} GiB, {over:,.1f} GiB too much"
        )


@dataclass
class Outcome:
    """What a search found. ranked: the best schedule of each variant, fastest first. rejected: what the model or the
    batch cannot be. excess: what does not fit in memory, the closest first. slower: variants that cannot be among the
    best; simulated: schedules that were."""

    ranked: list[Found] = field(default_factory=list)
    rejected: dict[str, Rejected] = field(default_factory=dict)
    excess: list[Excess] = field(default_factory=list)
    slower: int = 0
    simulated: int = 0

    def reject(self, reason: str, first: str) -> None:
        """Counts a candidate that cannot be, along with those whose reason differs in its numbers only."""
        kind = re.sub(r"[0-9]+", "0", reason)
        if kind in self.rejected:
            self.rejected[kind].count += 1
        else:
            self.rejected[kind] = Rejected(reason, first)


def search(
    made: Blueprint, gpus: int, hardware: Hardware, workload: Workload, top: int, refined: int = REFINED
) -> Outcome:
    """The best ways to train on so many GPUs, `top` variants of them; `refined` of these get the best cut.

    Raises UserError when nothing fits, with what is closest.
    """
    if gpus < 1:
        raise UserError(f"--gpus: expected a number of at least 1, not {gpus}")
    found = _Search(made, hardware, workload)
    found.run(gpus, top, refined)
    return found.outcome


@dataclass(frozen=True)
class _Estimated:
    """A schedule that was simulated."""

    weighed: Weighed


_Entry = Variant | Weighed | _Estimated


class _Search:
    def __init__(self, made: Blueprint, hardware: Hardware, workload: Workload) -> None:
        self._made, self._hardware, self._workload = made, hardware, workload
        self._weights = Weights(made, hardware, workload)
        self.outcome = Outcome()

    def run(self, gpus: int, top: int, refined: int) -> None:
        outcome = self.outcome
        queue: list[tuple[float, int, _Entry]] = []
        number = count()  # so that what is equally hopeful comes in the order in which it was found

        def add(seconds: float, entry: _Entry) -> None:
            heapq.heappush(queue, (seconds, next(number), entry))

        for ideal, variant in self._variants(gpus):
            add(ideal, variant)
        best: dict[int, float] = {}  # estimated seconds of the variants' best schedules, by identity
        done: set[int] = set()
        while queue and len(outcome.ranked) < top:
            seconds, _, entry = heapq.heappop(queue)
            if isinstance(entry, Variant):
                for weighed in self._schedules(entry):
                    add(weighed.bound, weighed)
            elif isinstance(entry, Weighed):
                enough = outcome.simulated >= MOST and len(best) > 0
                if not enough and seconds < PROMISE * best.get(id(entry.variant), float("inf")):
                    estimate = self._estimate(entry)
                    if estimate is not None:
                        best[id(entry.variant)] = min(estimate, best.get(id(entry.variant), estimate))
                        add(estimate, _Estimated(entry))
            elif id(entry.weighed.variant) not in done:
                found = self._predict(entry.weighed)
                if found is not None:
                    done.add(id(entry.weighed.variant))
                    outcome.ranked.append(found)
        outcome.slower = sum(isinstance(entry, Variant) for _, _, entry in queue)
        outcome.excess.sort(key=lambda one: one.needed - one.capacity)
        if not outcome.ranked:
            self._nothing(gpus)
        outcome.ranked.sort(key=lambda one: one.seconds)
        outcome.ranked[:refined] = [self._refined(found) for found in outcome.ranked[:refined]]
        outcome.ranked.sort(key=lambda one: one.seconds)

    def _nothing(self, gpus: int) -> None:
        where = f"--gpus {gpus} --hardware {self._hardware.name}"
        if self.outcome.excess:
            raise UserError(
                f"{where}: nothing fits in memory; the closest is {self.outcome.excess[0]}; use more GPUs, GPUs with "
                "more memory, shorter packs or micro-batches of fewer samples, or freeze parts of the model"
            )
        reasons = "; ".join(f"{one.reason} ({one.count} layouts)" for one in list(self.outcome.rejected.values())[:3])
        raise UserError(f"{where}: no layout is possible: {reasons}")

    def _variants(self, gpus: int) -> Iterator[tuple[float, Variant]]:
        """All that the model, the batch and the memory allow, as far as it is known without a schedule, each with its
        ideal time."""
        weights = self._weights
        for layout in layouts(gpus):
            if layout.tp * layout.ulysses > max(1, self._hardware.gpus_per_node):
                self.outcome.reject(LEAVES_NODE, str(layout))
                continue
            try:
                check_layout(self._made.family, self._made.model_config, layout)
                check_layers(weights.layers, layout.pp, weights.first_least)
            except UserError as error:
                self.outcome.reject(str(error), str(layout))
                continue
            for batch in batches(self._made.config.batch, layout, self._workload.longest):
                try:
                    samples = self._workload.micro_batches(batch, layout.dp)
                except UserError as error:
                    self.outcome.reject(str(error), str(layout))
                    continue
                for variant in weights.variants(layout, batch, samples):
                    plain = weights.weigh(variant, FIXED[0])
                    if not self._too_big(plain):
                        yield plain.ideal, variant

    def _schedules(self, variant: Variant) -> Iterator[Weighed]:
        """The fixed ones that there are layers for, and room for one activation at a time."""
        for pipelining in FIXED:
            if self._weights.possible(variant.layout, pipelining):
                weighed = self._weights.weigh(variant, pipelining)
                if not self._too_big(weighed):
                    yield weighed

    def _estimate(self, weighed: Weighed) -> float | None:
        """Seconds of a step, None where it does not fit."""
        self.outcome.simulated += 1
        try:
            seconds, held = weighed.estimate()
        except UserError:
            return None  # not even one micro-batch at a time keeps to the memory
        return None if self._exceeds(weighed, held) else seconds

    def _exceeds(self, weighed: Weighed, held: Sequence[float]) -> bool:
        """Whether so many bytes of activations are more than a stage has room for; counted then."""
        over = [bytes_ - cap for bytes_, cap in zip(held, weighed.prepared.caps, strict=True)]
        stage = max(range(len(over)), key=over.__getitem__)
        if over[stage] <= 0:
            return False
        capacity = self._hardware.memory_bytes
        self.outcome.excess.append(Excess(str(weighed), stage, capacity + over[stage], capacity))
        return True

    def _too_big(self, weighed: Weighed) -> bool:
        """Whether a stage has no room for the activations of even one micro-batch; counted then."""
        return self._exceeds(weighed, weighed.least_bytes)

    def _predict(self, weighed: Weighed) -> Found | None:
        """With all micro-batches; None where it does not fit."""
        variant, candidate = weighed.variant, weighed.candidate
        self.outcome.simulated += 1
        micro_batches = variant.micro_batches()
        prepared = prepare(self._weights.model, candidate, micro_batches, self._hardware)
        try:
            prediction = predict(
                self._weights.model, candidate, micro_batches, self._hardware, schedule_of, prepared=prepared
            )
        except UserError:
            return None
        if self._exceeds(weighed, prediction.timeline.peak_bytes):
            return None
        return Found(variant, weighed.pipelining, prediction, prepared.costs, min(prepared.caps))

    def _refined(self, found: Found) -> Found:
        """With the best cut for its schedule, or with a schedule made from its costs, whichever is fastest."""
        variant = found.variant
        if variant.layout.pp == 1:
            return found
        options = [found.pipelining]
        if len(variant.samples) * variant.layout.pp <= LONGEST:
            options += [one for one in PLANNED if self._weights.possible(variant.layout, one)]
        best = found
        for pipelining in options:
            # A schedule made from costs is slow to make. The cut that suits its placement's plain schedule suits it.
            plain = pipelining if pipelining in FIXED else pipelining.plain
            counts = self._cut(variant, plain)
            weighed = self._weights.weigh(variant, pipelining, counts)
            other = None if self._too_big(weighed) else self._predict(weighed)
            if other is not None and other.seconds < best.seconds:
                best = other
        return best

    def _cut(self, variant: Variant, pipelining: Pipelining) -> list[int]:
        """The best cut that is found."""

        def seconds(counts: Sequence[int]) -> float:
            weighed = self._weights.weigh(variant, pipelining, counts)
            estimate = None if self._too_big(weighed) else self._estimate(weighed)
            return float("inf") if estimate is None else estimate

        start = self._weights.balanced(len(pipelining.place(variant.layout.pp)))
        return search_split(start, seconds, [self._weights.first_least, *[1] * (len(start) - 1)], TRIES)
