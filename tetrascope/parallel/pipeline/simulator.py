"""How long a schedule takes, when every action begins and ends, what the stages wait, and what they hold.

Exact for its model of costs: a stage does one action at a time, in the order of the schedule, as early as what it
needs has arrived; transfers run beside the computation and do not slow each other down. Whole numbers and fractions
of `fractions.Fraction` as costs stay what they are, so that nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule
from tetrascope.parallel.pipeline.validator import order_of_execution

Table = Sequence[Sequence[float]]
"""A number for every chunk of the model and micro-batch."""


@dataclass(frozen=True)
class Costs:
    """Times in seconds, sizes in bytes; tables by chunk and micro-batch.

    A full backward takes backward_input + backward_weight. activation_bytes are held from the start of the forward;
    when the backward is in two parts, the first frees all but weight_bytes. A chunk without a backward holds them only
    till the next chunk, if it is on the same stage, has run forward. border_bytes, by micro-batch, cross
    between stages in each direction, in latency + bytes / bandwidth seconds; None: no bytes.
    """

    forward: Table
    backward_input: Table
    backward_weight: Table
    activation_bytes: Table | None = None
    weight_bytes: Table | None = None
    border_bytes: Sequence[float] | None = None
    latency: float = 0
    bandwidth: float = float("inf")

    @classmethod
    def equal(
        cls, chunks: int, micro_batches: int, forward: float, backward_input: float, backward_weight: float
    ) -> Costs:
        """The same for all chunks and micro-batches; transfers take no time, an activation counts as one byte."""

        def table(value: float) -> Table:
            return [[value] * micro_batches] * chunks

        return cls(table(forward), table(backward_input), table(backward_weight), table(1), table(1))

    def seconds(self, action: Action) -> float:
        """How long an action takes."""
        m, chunk = action.micro_batch, action.chunk
        if action.kind is Kind.FORWARD:
            return self.forward[chunk][m]
        if action.kind is Kind.BACKWARD_INPUT:
            return self.backward_input[chunk][m]
        if action.kind is Kind.BACKWARD_WEIGHT:
            return self.backward_weight[chunk][m]
        return self.backward_input[chunk][m] + self.backward_weight[chunk][m]

    def taken(self, action: Action) -> float:
        """Bytes that an action begins to hold."""
        if self.activation_bytes is None or action.kind is not Kind.FORWARD:
            return 0
        return self.activation_bytes[action.chunk][action.micro_batch]

    def freed(self, action: Action, graph: Graph) -> float:
        """Bytes that are free when an action has ended: its own, and those of a chunk that has no backward."""
        if self.activation_bytes is None:
            return 0
        m, chunk = action.micro_batch, action.chunk
        whole = self.activation_bytes[chunk][m]
        kept = self.weight_bytes[chunk][m] if self.weight_bytes is not None else whole
        if action.kind is not Kind.FORWARD:
            return {Kind.BACKWARD: whole, Kind.BACKWARD_INPUT: whole - kept}.get(action.kind, kept)
        own = 0 if graph.has_backward(chunk) or self._handed_on(action, graph) else whole
        before = Action(Kind.FORWARD, m, chunk - 1)
        if chunk and not graph.has_backward(chunk - 1) and self._handed_on(before, graph):
            own += self.activation_bytes[chunk - 1][m]
        return own

    @staticmethod
    def _handed_on(forward: Action, graph: Graph) -> bool:
        """Whether the next chunk, on the same stage, takes what a forward gives."""
        return graph.feeds(forward) is not None and not graph.travels(forward)

    def transfer(self, micro_batch: int) -> float:
        """How long a micro-batch travels from one stage to another."""
        sizes = self.border_bytes
        # Without a division, which would turn whole numbers into rounded ones, where it would give 0.
        if sizes is None or self.bandwidth == float("inf"):
            return self.latency
        return self.latency + sizes[micro_batch] / self.bandwidth


@dataclass(frozen=True)
class Span:
    """When an action ran, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step. By stage: spans in their order, seconds of work, most bytes held at once."""

    spans: tuple[tuple[Span, ...], ...]
    makespan: float
    busy: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    @property
    def bubble(self) -> tuple[float, ...]:
        """Seconds of the step in which each stage does nothing."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def waiting(self) -> tuple[float, ...]:
        """Seconds that each stage does nothing between its first action and its last: the bubble of arXiv 2401.10241,
        without the time to fill and drain the pipeline, in which stages may do something else."""
        ends = [(spans[0].start, spans[-1].end) if spans else (0, 0) for spans in self.spans]
        return tuple(end - start - busy for (start, end), busy in zip(ends, self.busy, strict=True))

    @property
    def bubble_share(self) -> float:
        """Share of the time of all stages that is bubble, 0 to 1."""
        return sum(self.bubble) / (self.makespan * len(self.busy)) if self.makespan else 0.0


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Runs a complete schedule against costs. Raises UserError when costs are missing or the stages deadlock."""
    graph = Graph(schedule)
    _check_sizes(costs, graph)
    spans: list[list[Span]] = [[] for _ in schedule]
    end: dict[Action, float] = {}
    for action in order_of_execution(schedule, graph):
        stage = graph.place[action][0]
        start: float = spans[stage][-1].end if spans[stage] else 0
        for need in graph.needs(action):
            travels = graph.place[need][0] != stage
            start = max(start, end[need] + (costs.transfer(action.micro_batch) if travels else 0))
        end[action] = start + costs.seconds(action)
        spans[stage].append(Span(action, start, end[action]))
    return Timeline(
        spans=tuple(map(tuple, spans)),
        makespan=max(end.values(), default=0),
        busy=tuple(sum(costs.seconds(action) for action in actions) for actions in schedule),
        peak_bytes=tuple(_peak_bytes(actions, costs, graph) for actions in schedule),
    )


def _peak_bytes(actions: Sequence[Action], costs: Costs, graph: Graph) -> float:
    """The most that one stage holds: what an action frees is held till its end."""
    held = peak = 0.0
    for action in actions:
        held += costs.taken(action)
        peak = max(peak, held)
        held -= costs.freed(action, graph)
    return peak


def _check_sizes(costs: Costs, graph: Graph) -> None:
    micro_batches = 1 + max((action.micro_batch for action in graph.place), default=-1)
    for field in ("forward", "backward_input", "backward_weight", "activation_bytes", "weight_bytes"):
        table: Table | None = getattr(costs, field)
        if table is not None and (len(table) < graph.chunks or any(len(row) < micro_batches for row in table)):
            raise UserError(
                f"costs.{field}: expected a row for each of {graph.chunks} chunks with a number for each of "
                f"{micro_batches} micro-batches"
            )
    if costs.border_bytes is not None and len(costs.border_bytes) < micro_batches:
        raise UserError(f"costs.border_bytes: expected a number for each of {micro_batches} micro-batches")
