"""The step plan: a pure function that every rank evaluates for itself.

What must hold follows from that: two ranks that disagreed would hang or train on different batches, and two layouts
that chose different samples could not be compared.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.engine.plan.samples import by_samples, by_tokens, image, numbers, placed, positions, random_infos, texts
from tetrascope.engine.config import BatchSection
from tetrascope.engine.plan import Cursor, Planner, SampleInfo, SourceIndex, StepPlan
from tetrascope.engine.plan.packing import LONGEST_WAIT
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import Layout

LAYOUTS: list[tuple[int, dict[str, int]]] = [(1, {}), (4, {}), (2, {"dp": 3}), (3, {"dp": 2, "tp": 4, "pp": 2})]

# Tokens that fit packs of 100, with patches that do not go with them; and the number of packs.
SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 9)), min_size=1, max_size=60)
PACKS = st.integers(1, 9)


# --- samples counted


@pytest.mark.parametrize(("micro_batches", "axes"), LAYOUTS)
def test_same_samples_in_every_layout(micro_batches: int, axes: dict[str, int]) -> None:
    infos = random_infos(100)
    one, other = by_samples(infos, 12), by_samples(infos, 12, micro_batches, **axes)
    for step in range(20):
        plan = other.plan(step)
        assert plan.draws == one.plan(step).draws  # in the same order, which names a sample's place
        assert sorted(placed(plan)) == list(range(12))
        assert [plan.place(draw.position) for draw in plan.draws] == list(range(12))
        assert len(plan.micro_batches) == axes.get("dp", 1)
        assert all(len(rank) == micro_batches for rank in plan.micro_batches)


def test_golden_plan() -> None:
    # A resumed run must find the batches of the run before it, whatever version of the package wrote that.
    infos = texts([10, 20, 30, 40, 50, 60])
    plan = by_samples(infos, 4, 2, seed=5).plan(1)
    assert numbers(plan) == [2, 1, 4, 1]  # the last two of epoch 0, the first two of epoch 1
    assert [draw.epoch for draw in plan.draws] == [0, 0, 1, 1]
    # Lengths 30, 20, 50, 20: 50 goes to the first, 30 and both of 20 to the second; the smaller one comes first.
    assert [micro.samples for micro in plan.micro_batches[0]] == [(2,), (0, 1, 3)]


@pytest.mark.parametrize(("count", "samples"), [(48, 12), (50, 12), (13, 12), (12, 12)])
def test_every_sample_exactly_once_an_epoch(count: int, samples: int) -> None:
    # The stream goes on across the border of epochs: nothing is left out where they do not divide into steps.
    made = by_samples(random_infos(count), samples)
    stream = [draw for step in range(-(-3 * count // samples)) for draw in made.plan(step).draws]
    epochs = [[draw.sample for draw in stream[e * count : (e + 1) * count]] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [draw.epoch for draw in stream[: 2 * count]] == [0] * count + [1] * count


def test_a_sample_twice_in_a_step_is_two_draws() -> None:
    made = by_samples(random_infos(5), 4, 2)
    twice = [plan for plan in map(made.plan, range(40)) if len(set(numbers(plan))) < 4]
    assert twice, "nothing was tested"
    for plan in twice:
        assert [plan.place(position) for position in positions(plan)] == sorted(placed(plan)) == [0, 1, 2, 3]


def test_without_shuffle_the_file_is_read_in_its_order() -> None:
    made = by_samples(random_infos(10), 4, shuffle=False)
    assert [number for step in range(5) for number in numbers(made.plan(step))] == [*range(10)] * 2


def test_seed_changes_the_order() -> None:
    infos = random_infos(50)
    assert numbers(by_samples(infos, 10, seed=1).plan(0)) != numbers(by_samples(infos, 10, seed=2).plan(0))


@pytest.mark.parametrize(("micro_batches", "dp"), [(1, 6), (6, 1), (2, 3)])
def test_every_micro_batch_gets_a_sample(micro_batches: int, dp: int) -> None:
    # One far heavier than all others together leaves the rest to the other bins.
    made = by_samples(texts([1] * 20 + [100_000]), 6, micro_batches, dp=dp)
    assert all(micro.samples for step in range(9) for rank in made.plan(step).micro_batches for micro in rank)


def test_batch_too_small_for_the_layout() -> None:
    with pytest.raises(UserError, match=r"batch\.samples: 7 samples cannot fill 4 micro-batches on each of 2 .* 8$"):
        by_samples(random_infos(100), 7, 4, dp=2)


def test_batch_larger_than_the_data_set() -> None:
    with pytest.raises(UserError, match=r"batch\.samples: 12 is more than the 11 samples there are; lower it"):
        by_samples(random_infos(11), 12)


def test_resume_with_another_number_of_samples_repeats_and_leaves_out_nothing() -> None:
    infos = random_infos(100)
    before, after = by_samples(infos, 12), by_samples(infos, 20)
    after.resume(before.plan(2).after)
    assert positions(after.plan(3)) == list(range(36, 56))


# --- tokens counted


@settings(max_examples=60, deadline=None)
@given(SIZES, PACKS, st.integers(0, 5))
def test_every_position_once_no_pack_over_capacity_no_wait_without_end(
    sizes: list[tuple[int, int]], packs: int, seed: int
) -> None:
    infos = _enough(sizes, packs * 100)
    made = by_tokens(infos, packs, 100, seed)
    steps, looked_at, taken_in = 30, [0], {}
    for step in range(steps):
        plan = made.plan(step)
        assert plan.step == step and positions(plan) == sorted(set(positions(plan)))
        assert sorted(placed(plan)) == list(range(len(plan.draws)))
        for micro in plan.micro_batches[0]:
            assert micro.samples and micro.rows == sum(infos[plan.draws[i].sample].tokens for i in micro.samples) <= 100
        for position in positions(plan):
            assert position not in taken_in
            taken_in[position] = step
        looked_at.append(plan.after.position)
    waiting = dict(plan.after.waiting)
    assert set(taken_in) | set(waiting) == set(range(plan.after.position))
    assert not set(taken_in) & set(waiting)
    for step in range(steps):
        for position in range(looked_at[step], looked_at[step + 1]):
            assert taken_in.get(position, steps) - step <= LONGEST_WAIT
            assert position in taken_in or waiting[position] == step


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 1, 2), (2, 2, 2)]), st.integers(1, 3))
def test_packs_are_the_same_in_every_layout(
    sizes: list[tuple[int, int]], axes: tuple[int, int, int], per_rank: int
) -> None:
    dp, tp, pp = axes
    infos = _enough(sizes, 800 * per_rank)
    one, other = by_tokens(infos, 8 * per_rank, 100), by_tokens(infos, 8 * per_rank, 100, dp=dp, tp=tp, pp=pp)
    for step in range(4):
        a, b = one.plan(step), other.plan(step)
        assert (a.draws, a.supervised, a.epochs, a.after) == (b.draws, b.supervised, b.epochs, b.after)
        assert _packs(a) == _packs(b)
        assert [len(rank) for rank in b.micro_batches] == [8 * per_rank // dp] * dp
        for rank in b.micro_batches:
            for micro in rank:
                tokens = sum(infos[b.draws[i].sample].tokens for i in micro.samples)
                assert micro.rows % tp == 0 and 0 <= micro.rows - tokens < tp and micro.rows <= 100


@settings(max_examples=25, deadline=None)
@given(SIZES, PACKS, st.integers(0, 12), st.booleans())
def test_resume_from_any_cursor_goes_on_as_if_nothing_had_happened(
    sizes: list[tuple[int, int]], packs: int, cut: int, counted: bool
) -> None:
    infos = _enough(sizes, packs * 100)
    assume(not counted or len(infos) >= packs)

    def made() -> Planner:
        return by_samples(infos, packs) if counted else by_tokens(infos, packs, 100)

    whole = made()
    plans = [whole.plan(step) for step in range(cut + 6)]
    resumed = made()
    resumed.resume(Cursor.from_json(json.loads(json.dumps(plans[cut].after.to_json())), "state.json"))
    assert [resumed.plan(step) for step in range(cut + 1, cut + 6)] == plans[cut + 1 :]
    assert made().plan(cut + 5) == plans[cut + 5]  # replayed from the beginning


@pytest.mark.parametrize("counted", [True, False])
def test_plan_depends_on_nothing_but_its_arguments(counted: bool) -> None:
    # Other steps asked for before, in any order, and another planner object: what differs between two ranks.
    infos = random_infos(200)

    def made() -> Planner:
        return by_samples(infos, 8, 2, dp=2) if counted else by_tokens(infos, 4, 2000, dp=2)

    first, second = made(), made()
    forwards = [first.plan(step) for step in range(15)]
    assert forwards == [second.plan(step) for step in reversed(range(15))][::-1]
    assert first.plan(3) == forwards[3]


def test_a_step_before_the_resumed_one_cannot_be_planned() -> None:
    made = by_samples(random_infos(20), 4)
    made.resume(Cursor(5, 20))
    assert made.plan(5).step == 5
    with pytest.raises(ValueError, match="step 4 lies before step 5"):
        made.plan(4)


def test_from_tokens_to_samples_nothing_that_waited_is_lost() -> None:
    infos = random_infos(200)
    plan = by_tokens(infos, 4, 2000).plan(0)
    waiting, start = [position for position, _ in plan.after.waiting], plan.after.position
    assert len(waiting) > 1, "nothing waited, so nothing was tested"
    made = by_samples(infos, len(waiting) - 1)
    made.resume(plan.after)
    assert positions(made.plan(1)) == waiting[:-1]
    assert positions(made.plan(2)) == [waiting[-1], *range(start, start + len(waiting) - 2)]
    assert made.plan(1).after.waiting == plan.after.waiting[-1:]


def test_batches_that_no_layout_or_data_can_fill() -> None:
    infos = texts([50] * 100)
    with pytest.raises(
        UserError, match=r"batch\.tokens: 600 .* 6 micro-batches, .* by parallel.dp=4; use dp of 1, 2, 3, 6, or .*=800"
    ):
        by_tokens(infos, 6, 100, dp=4)
    with pytest.raises(UserError, match=r"batch\.pack: 100 tokens do not divide by parallel\.tp=8, .*; use 96"):
        by_tokens(infos, 6, 100, tp=8)
    with pytest.raises(
        UserError, match=r"batch\.pack: 100 tokens do not divide by parallel\.ring=4 · parallel\.ulysses=2, .*; use 96"
    ):
        Planner.single(infos, 0, Layout(ring=4, ulysses=2), BatchSection(tokens=600, pack=100))
    with pytest.raises(
        UserError, match=r"batch\.pack: sample 2 of data\.train has 101 tokens, more than batch\.pack=100"
    ):
        by_tokens(texts([50, 60, 101] * 10), 6, 100)
    with pytest.raises(UserError, match=r"batch\.tokens: 5100 is more than the 5000 tokens there are; lower it"):
        by_tokens(infos, 51, 100)


# --- mixtures and weights


def test_mixture_draws_by_weight_and_names_the_source() -> None:
    sources = [SourceIndex("a", texts([10] * 300), 1.0), SourceIndex("b", texts([20] * 7), 3.0, shuffle=False)]
    made = Planner(sources, 0, Layout(dp=2), BatchSection(samples=64, micro_batches=2))
    draws = [draw for step in range(64) for draw in made.plan(step).draws]  # one block of 4096
    assert sum(draw.source == 0 for draw in draws) == 1024
    second = [(draw.sample, draw.epoch) for draw in draws if draw.source == 1]
    assert second == [(k % 7, k // 7) for k in range(3072)]
    assert made.plan(63).epochs == (1024 / 300, 3072 / 7)
    assert all(made.info(draw).tokens == (10, 20)[draw.source] for draw in draws)
    tokens = Planner(sources, 0, Layout(dp=2), BatchSection(tokens=2000, pack=500)).plan(1)
    assert {draw.source for draw in tokens.draws} == {0, 1}


@pytest.mark.parametrize(
    ("loss", "weights", "total"),
    [
        ("token", (1, 1, 1, 1), 31.0),
        ("sample", (1 / 4, 1 / 9, 1 / 18, 1), 3.0),
        ("sqrt", (1 / 2, 1 / 3, 18**-0.5, 1), 5 + 18**0.5),
    ],
)
def test_loss_weights_of_the_global_batch(loss: str, weights: tuple[float, ...], total: float) -> None:
    infos = [SampleInfo(20, supervised, ()) for supervised in (4, 9, 18, 0)]
    batch = BatchSection.model_validate({"samples": 4, "loss": loss})
    plan = Planner.single(infos, 0, Layout(), batch, shuffle=False).plan(0)
    assert tuple(plan.token_weight(place) for place in range(4)) == pytest.approx(weights, rel=1e-15)
    assert plan.total_weight == total == plan.weight(frozenset({3}))
    by_hand = {"token": 13.0, "sample": 2.0, "sqrt": 5.0}
    assert plan.weight(frozenset({2})) == by_hand[loss]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        {},
        {"step": 1, "position": 2},
        {"step": 1, "position": 2, "waiting": [[2, 0]]},
        {"step": 1, "position": 5, "waiting": [[2, 0], [1, 0]]},
        {"step": 1, "position": 5, "waiting": [[2, 3]]},
        {"step": -1, "position": 5, "waiting": []},
        {"step": "x", "position": 5, "waiting": []},
    ],
)
def test_damaged_cursors_are_refused(raw: object) -> None:
    with pytest.raises(UserError, match=r"^here: does not say where its run was in the data"):
        Cursor.from_json(raw, "here")


def _enough(sizes: list[tuple[int, int]], budget: int) -> list[SampleInfo]:
    """Samples of these sizes, over and over, until they are a global batch."""
    infos = [SampleInfo(tokens, 1, (image(1, patches),) if patches else ()) for tokens, patches in sizes]
    return infos * -(-budget // sum(tokens for tokens, _ in sizes))


def _packs(plan: StepPlan) -> set[tuple[int, ...]]:
    return {micro.samples for rank in plan.micro_batches for micro in rank}
