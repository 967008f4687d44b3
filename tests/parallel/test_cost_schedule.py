"""Schedules made for their costs.

Random stages, chunks, micro-batches, costs and caps: what comes out must be a proven schedule, within the caps, no
slower than any fixed one within them, and no faster than what no schedule can beat. The bounds are computed here from
the costs alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule
from tetrascope.parallel.pipeline.cost_schedule import cost_schedule, fixed_schedules, within
from tetrascope.parallel.pipeline.list_scheduler import ListScheduler, Policy, Problem, one_by_one
from tetrascope.parallel.pipeline.placement import Placement, fold, loop, with_vision
from tetrascope.parallel.pipeline.simulator import Costs, simulate
from tetrascope.parallel.pipeline.validator import validate


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `cost_schedule`."""

    placement: Placement
    micro_batches: int
    costs: Costs
    caps: tuple[float, ...] | None
    frozen: int
    vision_chunk: bool

    @property
    def problem(self) -> Problem:
        return Problem(self.placement, self.micro_batches, self.costs, self.caps, self.frozen, self.vision_chunk)

    def fixed(self) -> dict[str, Schedule]:
        return fixed_schedules(self.placement, self.micro_batches, self.frozen, self.vision_chunk)

    def schedule(self, effort: float = 1.0) -> Schedule:
        shape = self.placement, self.micro_batches, self.costs, self.caps, self.frozen, self.vision_chunk
        return cost_schedule(*shape, effort=effort)


@st.composite
def cases(draw: st.DrawFn, stages: int = 4, micro_batches: int = 8) -> Case:
    p, m = draw(st.integers(1, stages)), draw(st.integers(1, micro_batches))
    placement = draw(st.sampled_from([loop(p), loop(p), loop(p, 2), loop(p, 3), fold(p)]))
    if vision := draw(st.booleans()):
        placement = with_vision(placement)
    n = len(placement)
    frozen = draw(st.integers(0, min(2, n - 1)))
    # One random seed in place of hundreds of drawn numbers: examples are made faster, and shrink to a small shape.
    rng = random.Random(draw(st.integers(0, 2**32)))
    images = [rng.randint(0, 6) * (rng.random() < 0.7) for _ in range(m)]  # none for text alone

    def table(most: int) -> list[list[int]]:
        rows = [[rng.randint(0, most) for _ in range(m)] for _ in range(n)]
        return [[rng.randint(1, most) * count for count in images], *rows[1:]] if vision else rows

    whole = table(9)
    costs = Costs(
        forward=table(9),
        backward_input=table(9),
        backward_weight=table(9),
        activation_bytes=whole,
        weight_bytes=[[rng.randint(0, size) for size in row] for row in whole],
        border_bytes=[rng.randint(0, 20) for _ in range(m)],
        latency=rng.randint(0, 3),
        bandwidth=rng.choice([float("inf"), 10.0]),
    )
    case = Case(placement, m, costs, None, frozen, vision)
    if draw(st.booleans()):
        return case
    # Caps between what one micro-batch at a time needs and what a random schedule would take.
    least = simulate(one_by_one(case.problem), costs).peak_bytes
    room = draw(st.sampled_from([0.0, 0.5, 2.0, 6.0]))
    return dataclasses.replace(case, caps=tuple(size * (1 + room * rng.random()) for size in least))


def least_makespan(case: Case) -> float:
    """The busiest stage, and the way of a micro-batch forward and back, gradient of the weights at the end of it."""
    costs, place, n = case.costs, case.placement, len(case.placement)
    busy = [0.0] * (max(place) + 1)
    ways = []
    for m in range(case.micro_batches):
        way = 0.0
        for c in range(n):
            back = c >= case.frozen
            busy[place[c]] += costs.forward[c][m] + (costs.backward_input[c][m] + costs.backward_weight[c][m]) * back
            way += costs.forward[c][m] + costs.backward_input[c][m] * back
            if c and place[c] != place[c - 1]:
                way += costs.transfer(m) * (1 + (c > case.frozen))
        ways.append(way + costs.backward_weight[case.frozen][m])
    return max(*busy, *ways)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_valid_within_the_caps_and_never_worse(case: Case) -> None:
    schedule = case.schedule(effort=0.1)
    validate(schedule, case.micro_batches, frozen=case.frozen)
    validate(schedule, case.micro_batches, frozen=case.frozen, buffers=1)
    timeline = simulate(schedule, case.costs)
    assert within(timeline, case.caps)
    assert timeline.makespan >= least_makespan(case) - 1e-9
    for fixed in case.fixed().values():
        validate(fixed, case.micro_batches, frozen=case.frozen, buffers=1)
        other = simulate(fixed, case.costs)
        assert timeline.makespan <= other.makespan or not within(other, case.caps)


@st.composite
def policies(draw: st.DrawFn, micro_batches: int) -> Policy:
    return Policy(
        order=tuple(draw(st.permutations(range(micro_batches)))),
        priority="".join(draw(st.permutations("bftvw"))),
        split=draw(st.booleans()),
        ahead=draw(st.integers(1, 5)),
        deep=draw(st.booleans()),
        patience=draw(st.sampled_from([0.0, 0.3, 1.0])),
        reserve=draw(st.booleans()),
        queue=draw(st.sampled_from([0, 1, None])),
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_a_policy_promises(data: st.DataObject) -> None:
    case = data.draw(cases())
    policy = data.draw(policies(case.micro_batches))
    scheduler = ListScheduler(case.problem)
    run = scheduler.run(policy)
    if run is None:
        # Only full memory or full queues end in a deadlock. Where each stage has one chunk, and one more for the
        # vision encoder, memory never does.
        chunks = len(case.placement) - case.vision_chunk
        assert policy.queue is not None or (case.caps is not None and not policy.reserve)
        assert policy.queue == 1 or chunks > max(case.placement) + 1
        return
    validate(run.schedule, case.micro_batches, frozen=case.frozen)
    if policy.queue is not None:
        validate(run.schedule, case.micro_batches, frozen=case.frozen, buffers=1)
    timeline = simulate(run.schedule, case.costs)
    assert timeline.makespan == pytest.approx(run.makespan, rel=1e-12)
    assert within(timeline, case.caps)
    assert run.makespan >= scheduler.least - 1e-9
    first = [action.micro_batch for action in run.schedule[case.placement[0]] if action.chunk == 0]
    assert tuple(dict.fromkeys(first)) == policy.order
    kinds = {action.kind for actions in run.schedule for action in actions if action.chunk > case.frozen}
    assert kinds <= ({Kind.FORWARD, *"IW"} if policy.split else {Kind.FORWARD, Kind.BACKWARD})
    # A limit ends a run that cannot be shorter, and no other.
    limited = scheduler.run(policy, limit=run.makespan * 0.999)
    assert limited is None or limited.makespan == run.makespan
    assert scheduler.run(policy, limit=run.makespan * 1.001) == run


def every_schedule(split: bool) -> list[Schedule]:
    """All schedules of two stages and two micro-batches; backwards of the second stage in two parts if `split`."""

    def lines(stage: int, parts: str) -> list[tuple[Action, ...]]:
        actions = [Action(Kind(kind), m, stage) for m in (0, 1) for kind in parts]
        return [
            line
            for line in itertools.permutations(actions)
            if all(
                line.index(a) < line.index(b) for a, b in itertools.pairwise(actions) if a.micro_batch == b.micro_batch
            )
        ]

    made = []
    for schedule in itertools.product(lines(0, "FB"), lines(1, "FIW" if split else "FB")):
        try:
            validate(schedule, 2, buffers=1)
        except UserError:
            continue
        made.append(schedule)
    return made


def test_against_every_schedule_of_two_stages() -> None:
    # The optimum is known here. It is found in most cases, and no schedule is ever faster.
    every = every_schedule(split=True) + every_schedule(split=False)
    found = []
    for seed in range(25):
        rng = random.Random(seed)
        forward, inputs, weights = ([[rng.randint(1, 9) for _ in range(2)] for _ in range(2)] for _ in range(3))
        costs = Costs(forward, inputs, weights, latency=rng.randint(0, 2))
        best = min(simulate(schedule, costs).makespan for schedule in every)
        ours = simulate(cost_schedule(loop(2), 2, costs), costs).makespan
        assert best <= ours <= 1.1 * best
        found.append(ours == best)
    assert sum(found) >= 23


def uneven(layers: list[int], seed: int) -> Costs:
    """Four stages after a vision encoder: 16 micro-batches with 0 to 6 pictures; costs in those of a decoder layer's
    forward, a stage of seven layers has about half as much again for pictures; a head as heavy as a layer."""
    rng = random.Random(seed)
    pictures = [rng.randint(0, 6) for _ in range(16)]
    tokens = [0.85 + 0.3 * rng.random() for _ in range(16)]
    work = [[1.1 * count for count in pictures]]
    work += [[(count + (stage == 3)) * t for t in tokens] for stage, count in enumerate(layers)]
    half = [[0.5 * cost for cost in row] for row in work]
    return Costs(work, work, work, activation_bytes=work, weight_bytes=half, latency=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_half_the_bubble_of_1f1b_in_its_memory(seed: int) -> None:
    placement = with_vision(loop(4))
    by_hand = fixed_schedules(placement, 16, vision_chunk=True)["1f1b"]
    usual = simulate(by_hand, uneven([7, 7, 7, 7], seed))
    caps = [max(usual.peak_bytes)] * 4
    costs = uneven([5, 8, 8, 7], seed)
    ours = simulate(cost_schedule(placement, 16, costs, caps, vision_chunk=True), costs)
    assert within(ours, caps)
    assert ours.bubble_share < usual.bubble_share / 2


def test_vision_runs_ahead_where_that_fills_a_bubble() -> None:
    # A second of pictures for each micro-batch, and a second stage that is waited for: encoding all four takes none of
    # the step's time if it is done while stage 0 waits.
    costs = Costs(
        forward=[[2] * 4, [1] * 4, [4] * 4], backward_input=[[0] * 4, [1] * 4, [4] * 4], backward_weight=[[0] * 4] * 3
    )
    placement = with_vision(loop(2))
    schedule = cost_schedule(placement, 4, costs, frozen=1, vision_chunk=True)
    assert simulate(schedule, costs).makespan == 3 + 4 * 8 + 1


def test_vision_leaves_room_for_what_comes_after_it() -> None:
    # Two encoded micro-batches would fill the stage, so that neither could go on.
    costs = dataclasses.replace(Costs.equal(2, 3, 1, 1, 1), activation_bytes=[[4] * 3] * 2, weight_bytes=[[2] * 3] * 2)
    for cap, most in ((8, 1), (11, 1), (12, 2)):
        scheduler = ListScheduler(Problem(with_vision(loop(1)), 3, costs, (cap,), vision_chunk=True))
        run = scheduler.run(Policy((0, 1, 2), priority="vbtfw", ahead=3))
        assert run is not None
        ahead = [action.chunk == 0 and action.kind is Kind.FORWARD for action in run.schedule[0]]
        assert ahead[:3].index(False) == most


def test_same_arguments_same_schedule() -> None:
    costs = uneven([5, 8, 8, 7], 1)
    once, again = (cost_schedule(with_vision(loop(4)), 16, costs, vision_chunk=True) for _ in range(2))
    assert once == again


def test_more_effort_is_never_worse() -> None:
    costs = uneven([1, 4, 4, 4, 4, 4, 4, 3], 2)
    made = [cost_schedule(with_vision(fold(4)), 16, costs, vision_chunk=True, effort=e) for e in (0, 0.1, 1)]
    spans = [simulate(schedule, costs).makespan for schedule in made]
    assert spans[0] >= spans[1] >= spans[2] and spans[0] > spans[2]
    assert made[0] == fixed_schedules(with_vision(fold(4)), 16, vision_chunk=True)["zb-v"]


def test_fixed_schedules_that_fit_a_placement() -> None:
    assert set(fixed_schedules(loop(4), 3)) == {"gpipe", "1f1b", "zb-h1"}
    assert set(fixed_schedules(with_vision(loop(4, 3)), 3, vision_chunk=True)) == {"interleaved"}
    assert set(fixed_schedules(fold(4), 3)) == {"zb-v"}
    assert fixed_schedules((0, 1, 1), 3) == {}


def test_a_placement_that_no_fixed_schedule_fits() -> None:
    schedule = cost_schedule((1, 0, 2, 1), 5, Costs.equal(4, 5, 1, 1, 1))
    validate(schedule, 5, buffers=1)
    assert (
        simulate(schedule, Costs.equal(4, 5, 1, 1, 1)).makespan
        < simulate(
            one_by_one(Problem((1, 0, 2, 1), 5, Costs.equal(4, 5, 1, 1, 1))), Costs.equal(4, 5, 1, 1, 1)
        ).makespan
    )


def test_caps_that_nothing_fits() -> None:
    costs = dataclasses.replace(Costs.equal(3, 4, 1, 1, 1), activation_bytes=[[9] * 4, [2, 2, 2000, 2], [2] * 4])
    schedule = cost_schedule(loop(3), 4, costs, caps=[9, 2000, 2])
    assert simulate(schedule, costs).peak_bytes == (9, 2000, 2)
    with pytest.raises(UserError) as caught:
        cost_schedule(loop(3), 4, costs, caps=[9, 1999, 2])
    assert str(caught.value) == (
        "schedule: stage 1, micro-batch 2, action F2: the stage may hold 1,999 bytes of activations, this micro-batch "
        "alone needs 2,000; raise the cap, make micro-batches smaller, recompute more, or give the stage fewer layers"
    )
    with pytest.raises(UserError, match="caps: expected a number for each of 3 stages, found 2"):
        cost_schedule(loop(3), 4, costs, caps=[9, 9])
    with pytest.raises(UserError, match=r"costs\.forward: expected a row for each of 4 chunks"):
        cost_schedule(loop(4), 4, costs)
