"""What a step of a layout, cut and schedule takes: seconds, memory, and where both go.

Forward and backward are simulated action by action; then the gradients are reduced over the data-parallel ranks, their
norm is taken over all, each rank updates its share, and the parameters are gathered (`parallel/zero/optimizer.py`).
All data-parallel ranks are taken to be like the one whose micro-batches are given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tetrascope.engine.predict import costs as pieces
from tetrascope.engine.predict.costs import Cost, Kind, Parts, fields
from tetrascope.engine.predict.hardware import Hardware
from tetrascope.engine.predict.memory import FP32, StageMemory
from tetrascope.engine.predict.model import MicroBatchShape, Model, parts_of
from tetrascope.engine.recompute import Recompute
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.simulator import Costs, Timeline, simulate
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward

ADAM_PASSES = 10
"""Reads and writes of fp32 numbers for an element of the optimizer's share: norm (1), clipping (2), AdamW (7)."""


@dataclass(frozen=True)
class Candidate:
    """A way to lay out a run. cut: its placement must be one that the schedule can be made for. schedule: a name in
    GENERATORS, or what the given `ScheduleOf` knows."""

    layout: Layout
    cut: Cut
    schedule: str
    recompute: Recompute = "none"


ScheduleOf = Callable[[Candidate, int, Costs, Sequence[float], int], Schedule]
"""(candidate, micro-batches, costs, bytes of activations that each stage has room for, frozen chunks) -> schedule."""


def fixed_schedule(
    candidate: Candidate, micro_batches: int, costs: Costs, caps: Sequence[float], frozen: int
) -> Schedule:
    """The schedule of a generator, which looks at neither costs nor caps. Raises UserError for an unknown name."""
    if candidate.schedule not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise UserError(f"parallel.schedule: no generator is called {candidate.schedule!r}; choose one of {known}")
    cut, stages = candidate.cut, candidate.layout.pp
    chunks = len(cut.placement) - cut.vision_chunk
    schedule = GENERATORS[candidate.schedule](stages, micro_batches, chunks // stages)
    return without_backward(with_vision_chunk(schedule) if cut.vision_chunk else schedule, frozen)


@dataclass(frozen=True)
class Tail:
    """Seconds of a stage after its last backward."""

    reduction: float
    norm: float
    update: float
    gather: float


@dataclass(frozen=True)
class Prepared:
    """All that is known of a candidate before its schedule is.

    static: by stage, with workspace. caps: bytes that activations may take by stage, negative where not even the rest
    fits. frozen: leading chunks without backward. by_kind: what the stages together spend on each kind of part, all
    micro-batches. bound: no schedule's step is shorter.
    """

    costs: Costs
    static: tuple[StageMemory, ...]
    caps: tuple[float, ...]
    frozen: int
    by_kind: dict[Kind, Cost]
    tails: tuple[Tail, ...]
    bound: float

    def seconds(self, makespan: float) -> float:
        """The step, if every stage worked till the end of forward and backward."""
        return _end([makespan] * len(self.tails), self.tails)


@dataclass(frozen=True)
class Prediction:
    """A predicted step. Seconds, bytes by stage; tokens without padding; mfu counts no recomputation.

    breakdown: what an average GPU spends the step's seconds on; adds up to them.
    """

    candidate: Candidate
    schedule: Schedule
    timeline: Timeline
    seconds: float
    tokens_per_second_per_gpu: float
    mfu: float
    memory: tuple[StageMemory, ...]
    peak_bytes: tuple[float, ...]
    capacity: float
    breakdown: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether no stage needs more memory than there is."""
        return max(self.peak_bytes) <= self.capacity


def prepare(
    model: Model,
    candidate: Candidate,
    micro_batches: Sequence[MicroBatchShape],
    hardware: Hardware,
    parts: Parts | None = None,
) -> Prepared:
    """Costs, memory and a bound. parts: those of the same layout, recomputation and micro-batches, if made before."""
    layout, cut = candidate.layout, candidate.cut
    found = parts or pieces.parts(model, layout, candidate.recompute, micro_batches, hardware)
    counts = _counts(model, cut, found)
    # Sums in a fixed order, not a matrix product: ranks make schedules of these numbers, each for itself, and unlike
    # processors would round a product differently.
    table = np.zeros((len(cut.placement), len(micro_batches), len(Cost._fields)))
    for kind in range(len(found.kinds)):
        table += counts[:, kind, None, None] * found.costs[kind]
    frozen = model.frozen_chunks(cut)
    link = hardware.link(layout.world)
    costs = Costs(
        forward=fields(table, "forward", "tensor_forward", "context_forward").tolist(),
        backward_input=fields(table, "backward_input", "recompute", "tensor_backward", "context_backward").tolist(),
        backward_weight=fields(table, "backward_weight").tolist(),
        activation_bytes=_activations(table, found, cut, frozen),
        weight_bytes=fields(table, "rest").tolist(),
        border_bytes=found.border,
        latency=link.latency,
        bandwidth=link.bandwidth,
    )
    static = tuple(_memory(model, candidate, found, stage) for stage in range(layout.pp))
    tails = tuple(_tail(model, layout, hardware, one) for one in static)
    spent = counts.sum(axis=0)[:, None] * found.costs.sum(axis=1)
    by_chunk = fields(table, *Cost._fields[:8]).sum(axis=1).tolist()
    busy = [sum(by_chunk[chunk] for chunk in cut.chunks(stage)) for stage in range(layout.pp)]
    return Prepared(
        costs=costs,
        static=static,
        caps=tuple(hardware.memory_bytes - one.static - one.workspace_bytes for one in static),
        frozen=frozen,
        by_kind={kind: Cost(*row) for kind, row in zip(found.kinds, spent.tolist(), strict=True)},
        tails=tails,
        bound=_end(busy, tails),
    )


def predict(
    model: Model,
    candidate: Candidate,
    micro_batches: Sequence[MicroBatchShape],
    hardware: Hardware,
    schedule_of: ScheduleOf = fixed_schedule,
    parts: Parts | None = None,
    prepared: Prepared | None = None,
) -> Prediction:
    """Simulates a step of these micro-batches on every data-parallel rank.

    parts: see `prepare`; prepared: what it gave. Raises UserError when the schedule cannot be made.
    """
    ready = prepared or prepare(model, candidate, micro_batches, hardware, parts)
    schedule = schedule_of(candidate, len(micro_batches), ready.costs, ready.caps, ready.frozen)
    timeline = simulate(schedule, ready.costs)
    layout = candidate.layout
    ends = [spans[-1].end if spans else 0.0 for spans in timeline.spans]
    seconds = _end(ends, ready.tails)
    tokens = layout.dp * sum(micro.tokens for micro in micro_batches)
    work = layout.dp * model.flops(micro_batches)
    return Prediction(
        candidate=candidate,
        schedule=schedule,
        timeline=timeline,
        seconds=seconds,
        tokens_per_second_per_gpu=tokens / seconds / layout.world,
        mfu=work / (seconds * layout.world * hardware.peak(model.dtype)),
        memory=ready.static,
        peak_bytes=tuple(
            one.static + one.workspace_bytes + peak for one, peak in zip(ready.static, timeline.peak_bytes, strict=True)
        ),
        capacity=hardware.memory_bytes,
        breakdown=_breakdown(ready, layout.pp, seconds),
    )


def _counts(model: Model, cut: Cut, found: Parts) -> np.ndarray:
    """How often each chunk has each kind of part, `[chunks, kinds]`."""
    place = {kind: i for i, kind in enumerate(found.kinds)}
    counts = np.zeros((len(cut.placement), len(found.kinds)))
    counts[0, place["vision"]] = counts[cut.first, place["embed"]] = counts[cut.last, place["head"]] = 1
    for chunk, layers in enumerate(cut.layers):
        kinds: Counter[Kind] = Counter(model.layer_kind(i) for i in layers)
        for kind, count in kinds.items():
            counts[chunk, place[kind]] += count
    return counts


def _activations(table: np.ndarray, found: Parts, cut: Cut, frozen: int) -> list[list[float]]:
    """What every chunk keeps of every micro-batch; a chunk without backward, what it gives the next one."""
    kept: list[list[float]] = fields(table, "kept").tolist()
    for chunk in range(frozen):
        kept[chunk] = list(found.features if chunk < cut.first else found.border)
    return kept


def _memory(model: Model, candidate: Candidate, found: Parts, stage: int) -> StageMemory:
    layout, cut = candidate.layout, candidate.cut
    chunks = cut.chunks(stage)
    data = layout.dp * layout.ring * layout.ulysses
    held = [part for chunk in chunks for part in parts_of(cut, chunk)]
    workspace = max(found.layer_workspace)
    if cut.last in chunks:
        workspace = max(workspace, max(found.head_workspace))
    # Received, being sent, and their gradients.
    borders = 4 * max(found.border) if layout.pp > 1 else 0.0
    return replace(model.sizes(layout.tp).stage(held, data, model.item), workspace_bytes=workspace + borders)


def _tail(model: Model, layout: Layout, hardware: Hardware, memory: StageMemory) -> Tail:
    data = layout.dp * layout.ring * layout.ulysses
    link, world = hardware.link(layout.world // layout.pp), hardware.link(layout.world)
    reduction = link.gather(memory.gradient_bytes, data)
    reduction += hardware.link(layout.tp).reduce(memory.replicated, layout.tp)
    if layout.pp > 1 and memory.tied:
        reduction += world.reduce(memory.tied, 2)
    share = memory.gradient_bytes / data
    return Tail(
        reduction=reduction,
        norm=2 * math.ceil(math.log2(layout.world)) * world.latency if layout.world > 1 else 0.0,
        update=share / FP32 * (ADAM_PASSES * FP32 + model.item) / hardware.memory_bandwidth,
        gather=link.gather(memory.gradient_bytes / FP32 * model.item, data),
    )


def _end(ends: Sequence[float], tails: Sequence[Tail]) -> float:
    """When the step is over, if the stages' backwards end then: nobody updates before all gradients are reduced."""
    reduced = max(end + tail.reduction for end, tail in zip(ends, tails, strict=True))
    return reduced + max(tail.norm for tail in tails) + max(tail.update + tail.gather for tail in tails)


def _breakdown(ready: Prepared, stages: int, seconds: float) -> dict[str, float]:
    """Means over the stages; what is left of the step is bubble."""
    found = dict.fromkeys(("vision", "decoder", "head", "recompute", "tensor parallel", "context parallel"), 0.0)
    for kind, cost in ready.by_kind.items():
        name = kind if kind in ("vision", "head") else "decoder"
        found[str(name)] += (cost.forward + cost.backward_input + cost.backward_weight) / stages
        found["recompute"] += cost.recompute / stages
        found["tensor parallel"] += (cost.tensor_forward + cost.tensor_backward) / stages
        found["context parallel"] += (cost.context_forward + cost.context_backward) / stages
    found["gradient reduction"] = sum(tail.reduction for tail in ready.tails) / stages
    found["optimizer"] = sum(tail.norm + tail.update for tail in ready.tails) / stages
    found["parameter gather"] = sum(tail.gather for tail in ready.tails) / stages
    return {**found, "bubble": seconds - sum(found.values())}
