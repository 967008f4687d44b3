"""What a stage may rely on, with a plain run of the other stages as the oracle."""

from __future__ import annotations

import pytest

from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.program import program
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward

SCHEDULES = {
    name: schedule
    for base in GENERATORS
    for name, schedule in {
        base: GENERATORS[base](3, 4),
        f"{base}, frozen": without_backward(with_vision_chunk(GENERATORS[base](2, 5)), 1),
    }.items()
}


def reached(schedule: Schedule, stage: int, stop: int) -> set[Action]:
    """All that can be done when a stage does its first `stop` actions and no more."""
    graph, done = Graph(schedule), set[Action]()
    lines = [list(actions[:stop] if s == stage else actions) for s, actions in enumerate(schedule)]
    moved = True
    while moved:
        moved = False
        for line in lines:
            while line and all(need in done for need in graph.needs(line[0])):
                done.add(line.pop(0))
                moved = True
    return done


@pytest.mark.parametrize("name", SCHEDULES)
def test_after(name: str) -> None:
    schedule = SCHEDULES[name]
    graph, several = Graph(schedule), 0
    for stage in range(len(schedule)):
        for at, one in enumerate(program(schedule, stage)):
            if one.source in (None, stage):
                assert one.after == 0
                continue
            (giver,) = [need for need in graph.needs(one.action) if graph.feeds(need) == one.action]
            assert one.after <= at
            assert giver in reached(schedule, stage, one.after)
            assert not one.after or giver not in reached(schedule, stage, one.after - 1)
            several += one.after > 0
    assert several


@pytest.mark.parametrize("name", SCHEDULES)
def test_taken(name: str) -> None:
    schedule = SCHEDULES[name]
    for stage in range(len(schedule)):
        for one in program(schedule, stage):
            if one.source in (None, stage):
                assert one.taken == (0, 0)
                continue
            mine = [a for other in program(schedule, one.source) if other.target == stage for a in [other.action]]
            giver = next(a for a in mine if feeds(a, one.action))
            until = schedule[one.source][: schedule[one.source].index(giver) + 1]
            received = [o.action.kind is Kind.FORWARD for o in program(schedule, one.source) if o.source == stage]
            asked = [o.action in until for o in program(schedule, one.source) if o.source == stage]
            counts = [sum(a and f == forward for a, f in zip(asked, received, strict=True)) for forward in (0, 1)]
            assert one.taken == tuple(counts)


def feeds(giver: Action, taker: Action) -> bool:
    """Neighbouring chunks, the same micro-batch, the same direction."""
    forward = giver.kind is Kind.FORWARD
    step = 1 if forward else -1
    same = giver.micro_batch == taker.micro_batch and forward == (taker.kind is Kind.FORWARD)
    return same and giver.kind is not Kind.BACKWARD_WEIGHT and giver.chunk + step == taker.chunk
