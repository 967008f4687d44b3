"""The simulator: against a simulation that goes through time second by second, against the formulas of the papers, and
for random stages, chunks, micro-batches and costs against what no schedule can beat.

All times are whole numbers, so that equal means equal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule, from_text, placement_of
from tetrascope.parallel.pipeline.generators import GENERATORS, gpipe, interleaved, one_forward_one_backward
from tetrascope.parallel.pipeline.simulator import Costs, Timeline, simulate
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward
from tetrascope.parallel.pipeline.validator import live_activations, validate
from tetrascope.parallel.pipeline.zero_bubble import zb_h1, zb_v


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule with costs for all its chunks and micro-batches."""

    name: str
    schedule: Schedule
    chunks: int
    micro_batches: int
    costs: Costs
    frozen: int


@st.composite
def cases(draw: st.DrawFn, stages: int = 6, micro_batches: int = 14, most: int = 20) -> Case:
    name = draw(st.sampled_from(sorted(GENERATORS)))
    p, m = draw(st.integers(1, stages)), draw(st.integers(1, micro_batches))
    generator = GENERATORS[name]
    v = generator.virtual_stages if generator.fixed else draw(st.integers(1, 4))
    schedule, chunks = generator(p, m, v), p * v
    if draw(st.booleans()):
        schedule, chunks = with_vision_chunk(schedule), chunks + 1
    frozen = draw(st.integers(0, min(2, chunks - 1)))

    def table(low: int) -> list[list[int]]:
        rows = st.lists(st.integers(low, most), min_size=m, max_size=m)
        return draw(st.lists(rows, min_size=chunks, max_size=chunks))

    whole = table(1)
    costs = Costs(
        forward=table(0),
        backward_input=table(0),
        backward_weight=table(0),
        activation_bytes=whole,
        weight_bytes=[[draw(st.integers(0, size)) for size in row] for row in whole],
        latency=draw(st.integers(0, 5)),
    )
    return Case(name, without_backward(schedule, frozen), chunks, m, costs, frozen)


def second_by_second(schedule: Schedule, costs: Costs) -> dict[Action, tuple[int, int]]:
    """Start and end of every action, found by going through time; none may take no time, transfers take `latency`."""
    home = {action.chunk: stage for stage, actions in enumerate(schedule) for action in actions}
    left = [list(actions) for actions in schedule]
    spans: dict[Action, tuple[int, int]] = {}
    free_at = [0] * len(schedule)
    gradients = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
    now = 0

    def arrived(kinds: tuple[Kind, ...], m: int, chunk: int, here: int) -> bool:
        delay = 0 if home[chunk] == here else int(costs.latency)
        return any((a := Action(k, m, chunk)) in spans and spans[a][1] + delay <= now for k in kinds)

    while any(left):
        for stage, actions in enumerate(left):
            if not actions or free_at[stage] > now:
                continue
            action = actions[0]
            m, chunk = action.micro_batch, action.chunk

            if action.kind is Kind.FORWARD:
                ready = chunk - 1 not in home or arrived((Kind.FORWARD,), m, chunk - 1, stage)
            elif action.kind is Kind.BACKWARD_WEIGHT:
                ready = arrived((Kind.BACKWARD_INPUT,), m, chunk, stage)
            else:
                ready = arrived((Kind.FORWARD,), m, chunk, stage) and (
                    chunk + 1 not in home or arrived(gradients, m, chunk + 1, stage)
                )
            if ready:
                free_at[stage] = now + int(costs.seconds(action))
                spans[action] = (now, free_at[stage])
                actions.pop(0)
        now += 1
    return spans


def longest_path(case: Case) -> float:
    """The way of a micro-batch through all chunks and back, with the gradient of the weights where it ends."""
    costs, home = case.costs, placement_of(case.schedule)
    split = any(action.kind is Kind.BACKWARD_INPUT for actions in case.schedule for action in actions)
    paths = []
    for m in range(case.micro_batches):
        way = 0.0
        for c in range(case.chunks):
            border = costs.latency if c and home[c] != home[c - 1] else 0
            way += costs.forward[c][m] + border
            if c >= case.frozen:
                way += costs.backward_input[c][m] + (border if c > case.frozen else 0)
                way += costs.backward_weight[c][m] if c == case.frozen or not split else 0
        paths.append(way)
    return max(paths)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_random_schedules_run_and_beat_no_bound(case: Case) -> None:
    buffers = 1 if case.name in ("interleaved", "zb-v") else 0
    validate(case.schedule, case.micro_batches, frozen=case.frozen)
    validate(case.schedule, case.micro_batches, frozen=case.frozen, buffers=buffers)
    timeline = simulate(case.schedule, case.costs)
    assert timeline.makespan >= max(timeline.busy)
    assert timeline.makespan >= longest_path(case)
    costs = case.costs
    trained = (*costs.backward_input[case.frozen :], *costs.backward_weight[case.frozen :])
    total = sum(map(sum, (*costs.forward, *trained)))
    assert sum(timeline.busy) == total
    for stage, spans in enumerate(timeline.spans):
        assert tuple(span.action for span in spans) == case.schedule[stage]
        assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
        assert timeline.bubble[stage] >= timeline.waiting[stage] >= 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(stages=4, micro_batches=6, most=5))
def test_same_as_second_by_second(case: Case) -> None:
    def at_least_one(table: list[list[int]]) -> list[list[int]]:
        return [[max(1, cost) for cost in row] for row in table]

    fields = ("forward", "backward_input", "backward_weight")
    costs = dataclasses.replace(case.costs, **{f: at_least_one(getattr(case.costs, f)) for f in fields})
    expected = second_by_second(case.schedule, costs)
    timeline = simulate(case.schedule, costs)
    assert {s.action: (s.start, s.end) for spans in timeline.spans for s in spans} == expected
    assert timeline.makespan == max(end for _, end in expected.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(stages=4, micro_batches=8))
def test_peak_bytes(case: Case) -> None:
    # Found again from the spans: what is held while each action runs.
    costs = case.costs
    assert costs.activation_bytes is not None
    assert costs.weight_bytes is not None
    for actions, peak in zip(case.schedule, simulate(case.schedule, costs).peak_bytes, strict=True):
        heights = []
        for at in range(len(actions)):
            begun, ended = set(actions[: at + 1]), set(actions[:at])
            height = 0
            for m in range(case.micro_batches):
                for c in {action.chunk for action in actions}:
                    f, b, i, w = (Action(Kind(k), m, c) for k in "FBIW")
                    following = Action(Kind.FORWARD, m, c + 1)
                    # Without a backward, an activation goes when its reader is done, or when it is sent.
                    last = following if following in actions else f
                    done = last in ended if c < case.frozen else b in ended or w in ended
                    if f in begun and not done:
                        height += (costs.weight_bytes if i in ended else costs.activation_bytes)[c][m]
            heights.append(height)
        assert peak == max(heights)


def test_peak_bytes_of_a_vision_chunk_that_runs_ahead() -> None:
    # By hand: 5 bytes for each picture that waits, 3 for what the decoder keeps for its backward.
    costs = Costs(*([[1, 1], [1, 1]] for _ in range(3)), activation_bytes=[[5, 5], [3, 3]])
    ahead, in_turn = from_text("F0 F1 F0c1 B0c1 F1c1 B1c1"), from_text("F0 F0c1 B0c1 F1 F1c1 B1c1")
    assert simulate(ahead, costs).peak_bytes == (13,)
    assert simulate(in_turn, costs).peak_bytes == (8,)
    # Sent to another stage, it is no longer held.
    assert simulate(from_text("F0 F1\nF0 B0 F1 B1"), costs).peak_bytes == (5, 3)


def equal(schedule: Schedule, forward: int, backward_input: int, backward_weight: int) -> Timeline:
    chunks = 1 + max(action.chunk for actions in schedule for action in actions)
    micro_batches = 1 + max(action.micro_batch for action in schedule[0])
    return simulate(schedule, Costs.equal(chunks, micro_batches, forward, backward_input, backward_weight))


COSTS = [(1, 1, 1), (4, 5, 3), (3, 2, 1)]


@pytest.mark.parametrize("generate", [gpipe, one_forward_one_backward])
@pytest.mark.parametrize("costs", COSTS)
def test_bubble_of_gpipe_and_1f1b(generate: Callable[[int, int], Schedule], costs: tuple[int, int, int]) -> None:
    # arXiv 1811.06965 §2.3; arXiv 2104.04473 §2.2: (p − 1) / (m + p − 1) of the step on each stage.
    for p in range(1, 7):
        for m in (p, p + 1, 4 * p):
            timeline = equal(generate(p, m), *costs)
            assert timeline.makespan == (m + p - 1) * sum(costs)
            assert timeline.bubble == ((p - 1) * sum(costs),) * p
            assert timeline.bubble_share == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize("costs", COSTS)
def test_bubble_of_interleaved(costs: tuple[int, int, int]) -> None:
    # arXiv 2104.04473 §2.2: the bubble is v times shorter, (p − 1)·(F + B) / v of a whole stage's times, hence
    # (p − 1) / (v·m + p − 1) of the step. Times here are those of one chunk.
    for p in range(1, 6):
        for v in range(1, 5):
            for m in (p, 2 * p, 5 * p):
                timeline = equal(interleaved(p, m, v), *costs)
                assert timeline.bubble == ((p - 1) * sum(costs),) * p
                assert timeline.bubble_share == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


def test_interleaved_with_any_number_of_micro_batches() -> None:
    # No slower than the next multiple of p, of which it is a part.
    for p in range(2, 6):
        for m in range(1, 3 * p):
            whole = equal(interleaved(p, -(-m // p) * p, 2), 1, 1, 1)
            assert equal(interleaved(p, m, 2), 1, 1, 1).makespan <= whole.makespan


@pytest.mark.parametrize("costs", [*COSTS, (10, 12, 8)])
def test_bubble_of_zb_h1(costs: tuple[int, int, int]) -> None:
    # arXiv 2401.10241 §2.3, for a gradient of the weights that takes no longer than a forward.
    f, i, w = costs
    for p in range(1, 7):
        for m in (2 * p, 2 * p + 1, 5 * p):
            timeline = equal(zb_h1(p, m), f, i, w)
            assert timeline.bubble == ((p - 1) * (f + i - w),) * p


def test_bubble_of_zb_v() -> None:
    # arXiv 2401.10241 §6: none with F = I = W. Stages wait only for the pipeline to fill, and end with it.
    for p in range(1, 9):
        for m in (2 * p, 2 * p + 1, 6 * p):
            timeline = equal(zb_v(p, m), 1, 1, 1)
            assert timeline.waiting == (0,) * p
            assert timeline.makespan == 6 * m + p - 1
    # With costs that are near each other it stays near: the bubble does not grow with the micro-batches.
    for p in range(2, 9):
        short, long = (equal(zb_v(p, m), 10, 11, 9) for m in (2 * p, 8 * p))
        assert max(short.bubble) == max(long.bubble) < 2 * p * 10
        assert long.bubble_share < 0.04 < equal(one_forward_one_backward(p, 8 * p), 20, 22, 18).bubble_share


def test_zero_bubble_orders() -> None:
    # Same memory as 1F1B on its first stage, in ever shorter steps; a chunk of the V is half a stage.
    for p in range(2, 7):
        for m in (2 * p, 4 * p):
            plain, h1 = (equal(generate(p, m), 2, 2, 2) for generate in (one_forward_one_backward, zb_h1))
            folded = equal(zb_v(p, m), 1, 1, 1)
            assert plain.makespan > h1.makespan > folded.makespan
            assert plain.peak_bytes[0] == p == max(h1.peak_bytes) == max(folded.peak_bytes) / 2


def test_peak_bytes_count_live_activations() -> None:
    schedule = zb_h1(4, 9)
    assert equal(schedule, 1, 1, 1).peak_bytes == tuple(max(live_activations(actions)) for actions in schedule)


def test_transfers() -> None:
    # One micro-batch over three stages: four transfers of 3 + 8/2 seconds. A chunk on the same stage has none.
    costs = dataclasses.replace(Costs.equal(3, 1, 1, 1, 1), border_bytes=[8], latency=3, bandwidth=2)
    assert simulate(gpipe(3, 1), costs).makespan == 9 + 4 * 7
    assert simulate(from_text("F0 F0c1 F0c2 B0c2 B0c1 B0"), costs).makespan == 9


def test_unequal_micro_batches_by_hand() -> None:
    # Stage 0: F0 0-1, F1 1-6, B0 from stage 1's B0 at 4 but not before F1 is done, B1 after stage 1's.
    costs = Costs(forward=[[1, 5], [1, 2]], backward_input=[[1, 1], [1, 3]], backward_weight=[[1, 2], [1, 1]])
    timeline = simulate(one_forward_one_backward(2, 2), costs)
    assert [(str(s.action), s.start, s.end) for s in timeline.spans[0]] == [
        ("F0c0", 0, 1),
        ("F1c0", 1, 6),
        ("B0c0", 6, 8),
        ("B1c0", 12, 15),
    ]
    assert [(s.start, s.end) for s in timeline.spans[1]] == [(1, 2), (2, 4), (6, 8), (8, 12)]
    assert (timeline.makespan, timeline.busy, timeline.bubble, timeline.waiting) == (15, (11, 9), (4, 6), (4, 2))
    assert timeline.bubble_share == pytest.approx(10 / 30)


def test_fractions_are_not_rounded() -> None:
    third = Fraction(1, 3)
    timeline = simulate(one_forward_one_backward(3, 4), Costs.equal(3, 4, third, third, third))  # type: ignore[arg-type]
    assert timeline.makespan == Fraction(6)
    assert isinstance(timeline.makespan, Fraction)


def test_missing_costs_and_deadlocks() -> None:
    with pytest.raises(UserError, match=r"costs\.forward: expected a row for each of 3 chunks with a number for each"):
        simulate(gpipe(3, 4), Costs.equal(2, 4, 1, 1, 1))
    with pytest.raises(UserError, match=r"costs\.border_bytes: expected a number for each of 4 micro-batches"):
        simulate(gpipe(3, 4), dataclasses.replace(Costs.equal(3, 4, 1, 1, 1), border_bytes=[1, 2, 3]))
    with pytest.raises(UserError, match="deadlock"):
        simulate(from_text("B0 F0"), Costs.equal(1, 1, 1, 1, 1))
