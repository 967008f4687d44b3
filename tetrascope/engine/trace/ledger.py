"""Where the time of a traced step went, rank by rank, in parts that add up to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from tetrascope.engine.trace.record import RankTrace, StepTrace, TracedAction
from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule, from_text
from tetrascope.parallel.pipeline.simulator import Costs, simulate

PARTS = {
    "forward": "forwards",
    "backward": "backwards, or their part that gives the gradient of the input",
    "weights": "the part of backwards that gives the gradients of weights, where it is done apart",
    "bubble": "waiting that this schedule would have if all micro-batches of a chunk cost the same",
    "imbalance": "waiting beyond that, because they do not, or a stage was held up",
    "transfer": "waiting for what another stage has sent already, and for the last sends",
    "gradient reduction": "sums over data-parallel ranks, replicated and tied copies, and the norm",
    "optimizer": "update, and gathering of the parameters",
    "data wait": "waiting for the next micro-batches",
    "other": "agreement on unreadable samples, logging",
}
"""Part of a step -> what it is."""

_KINDS = {Kind.FORWARD: "forward", Kind.BACKWARD_WEIGHT: "weights"}


@dataclass(frozen=True)
class Ledger:
    """Seconds of a rank's step by `PARTS`."""

    rank: int
    stage: int
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


def action_of(traced: TracedAction) -> Action:
    """The action that a traced one is."""
    return from_text(traced.action)[0][0]


def ledgers(trace: StepTrace) -> list[Ledger]:
    """The ledger of every rank."""
    found = []
    for dp in range(len(trace.schedules)):
        schedule = trace.schedule(dp)
        graph = Graph(schedule)
        own = [rank for rank in trace.ranks if rank.place["dp"] == dp]
        for rank in own:
            same = {axis: at for axis, at in rank.place.items() if axis != "pp"}
            pipeline = [r for r in own if all(r.place[axis] == at for axis, at in same.items())]
            pipeline.sort(key=lambda r: r.place["pp"])
            found.append(_ledger(rank, pipeline, schedule, graph))
    return sorted(found, key=lambda ledger: ledger.rank)


def _ledger(rank: RankTrace, pipeline: Sequence[RankTrace], schedule: Schedule, graph: Graph) -> Ledger:
    phases, stage = rank.phases, rank.place["pp"]
    parts = dict.fromkeys(PARTS, 0.0)
    for name in ("data wait", "gradient reduction", "optimizer"):
        parts[name] = phases[name]
    ends = {action_of(one): one.end for other in pipeline for one in other.actions}
    idle = 0.0
    for one in rank.actions:
        action = action_of(one)
        parts[_KINDS.get(action.kind, "backward")] += one.end - one.start
        sent = max((ends[need] for need in graph.needs(action) if graph.place[need][0] != stage), default=one.asked)
        waited = one.start - one.asked
        unsent = min(max(0.0, sent - one.asked), waited)
        idle += unsent
        parts["transfer"] += waited - unsent
    # Between the first action's readiness and the last one's end everything is counted but the executor's own steps.
    counted = sum(one.end - one.asked for one in rank.actions)
    parts["transfer"] += phases["pipeline"] - counted
    # Ranks that are through wait for the slowest in the reduction, which nobody leaves before all have entered it.
    through = rank.ends[2]
    drain = min(max(other.ends[2] for other in pipeline) - through, phases["gradient reduction"])
    parts["gradient reduction"] -= drain
    idle += drain
    costs = mean_costs(schedule, pipeline)
    parts["bubble"] = min(idle, simulate(schedule, costs).bubble[stage])
    parts["imbalance"] = idle - parts["bubble"]
    parts["other"] = phases["agreement"] + phases["other"]
    return Ledger(rank.rank, stage, parts)


def measured_costs(schedule: Schedule, pipelines: Sequence[Sequence[RankTrace]], predicted: Costs) -> Costs:
    """What the actions took, the mean of several recorded steps of one schedule; sizes and links as predicted."""
    seconds: dict[Action, list[float]] = defaultdict(list)
    for pipeline in pipelines:
        for rank in pipeline:
            for one in rank.actions:
                seconds[action_of(one)].append(one.end - one.start)
    return _costs(schedule, {action: fmean(values) for action, values in seconds.items()}, predicted)


def mean_costs(schedule: Schedule, pipeline: Sequence[RankTrace]) -> Costs:
    """What the actions took, for each kind and chunk the mean of all micro-batches; transfers take no time."""
    seconds: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for rank in pipeline:
        for one in rank.actions:
            action = action_of(one)
            seconds[action.kind, action.chunk].append(one.end - one.start)
    every = {action: fmean(seconds[action.kind, action.chunk]) for actions in schedule for action in actions}
    return _costs(schedule, every, Costs([], [], []))


def _costs(schedule: Schedule, seconds: dict[Action, float], other: Costs) -> Costs:
    """Costs by action; a whole backward counts as the part of the input."""
    chunks = 1 + max(action.chunk for action in seconds)
    count = 1 + max(action.micro_batch for action in seconds)

    def table(*kinds: Kind) -> list[list[float]]:
        return [
            [sum(seconds.get(Action(kind, m, chunk), 0.0) for kind in kinds) for m in range(count)]
            for chunk in range(chunks)
        ]

    return replace(
        other,
        forward=table(Kind.FORWARD),
        backward_input=table(Kind.BACKWARD, Kind.BACKWARD_INPUT),
        backward_weight=table(Kind.BACKWARD_WEIGHT),
    )
