"""Pipeline schedules: their text form, their differences, and what the generators make.

What a generator claims (complete, never stuck, so many activations) is proven for every size up to six stages here
and for random ones in test_simulator.py, with their times.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule, difference, from_text, placement_of, to_text
from tetrascope.parallel.pipeline.generators import GENERATORS, gpipe, interleaved, one_forward_one_backward
from tetrascope.parallel.pipeline.placement import chunks_of, fold, loop, with_vision
from tetrascope.parallel.pipeline.validator import live_activations, validate
from tetrascope.parallel.pipeline.zero_bubble import zb_h1, zb_v

SIZES = list(itertools.product(range(1, 7), range(1, 10)))  # stages and micro-batches, fewer of these than stages too

ACTIONS = st.builds(Action, st.sampled_from(Kind), st.integers(0, 200), st.integers(0, 12))
ANY_SCHEDULE = st.lists(st.lists(ACTIONS, max_size=12).map(tuple), max_size=6).map(tuple)


def most_live(schedule: Schedule) -> list[int]:
    """The most activations that each stage holds at once."""
    return [max(live_activations(actions)) for actions in schedule]


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_generated_schedules_are_valid(name: str, stages: int, micro_batches: int) -> None:
    schedule = GENERATORS[name](stages, micro_batches)
    assert len(schedule) == stages
    validate(schedule, micro_batches)
    # One posted receive for each neighbour and direction is enough for all; where each stage has one chunk, none.
    validate(schedule, micro_batches, buffers=1 if name in ("interleaved", "zb-v") else 0)


@pytest.mark.parametrize("name", GENERATORS)
def test_chunks_lie_where_the_generator_says(name: str) -> None:
    generator = GENERATORS[name]
    for stages, micro_batches in SIZES:
        for virtual in (None,) if generator.fixed else (None, 1, 2, 3):
            schedule = generator(stages, micro_batches, virtual)
            assert placement_of(schedule) == generator.place(stages, virtual or generator.virtual_stages)


def test_placements() -> None:
    assert loop(3) == (0, 1, 2)
    assert loop(3, 2) == (0, 1, 2, 0, 1, 2)
    assert fold(3) == (0, 1, 2, 2, 1, 0)
    assert with_vision(fold(2)) == (0, 0, 1, 1, 0)
    assert chunks_of(with_vision(fold(2)), 0) == (0, 1, 4)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_memory_of_1f1b(stages: int, micro_batches: int) -> None:
    # PipeDream-Flush (arXiv 2006.09503 §3): stage s holds stages − s micro-batches, as many as fit into the way of a
    # micro-batch to the last stage and back.
    schedule = one_forward_one_backward(stages, micro_batches)
    assert most_live(schedule) == [min(stages - s, micro_batches) for s in range(stages)]


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_memory_of_zero_bubble(stages: int, micro_batches: int) -> None:
    # Both keep to what 1F1B holds on its first stage (arXiv 2401.10241 §2.3 and §6); the chunks of a V are half as
    # large.
    assert most_live(zb_h1(stages, micro_batches)) == [min(stages, micro_batches)] * stages
    most = most_live(zb_v(stages, micro_batches))
    assert max(most) <= 2 * stages
    if micro_batches >= 2 * stages:
        assert most == [2 * stages] * stages


@pytest.mark.parametrize(("stages", "groups", "virtual"), list(itertools.product((2, 3, 5), (2, 3), (2, 3, 4))))
def test_memory_of_interleaved(stages: int, groups: int, virtual: int) -> None:
    # The warm-up of arXiv 2104.04473 (its implementation counts 2·(p − s − 1) + (v − 1)·p) and the forward after it.
    most = most_live(interleaved(stages, groups * stages, virtual))
    assert most == [2 * (stages - s - 1) + (virtual - 1) * stages + 1 for s in range(stages)]


def test_memory_of_gpipe() -> None:
    assert most_live(gpipe(3, 7)) == [7, 7, 7]


def test_golden_1f1b() -> None:
    # Figure 4 of arXiv 2104.04473, for three stages and five micro-batches.
    assert to_text(one_forward_one_backward(3, 5)) == (
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4\nF0 F1 B0 F2 B1 F3 B2 F4 B3 B4\nF0 B0 F1 B1 F2 B2 F3 B3 F4 B4"
    )


def test_golden_with_fewer_micro_batches_than_stages() -> None:
    assert to_text(one_forward_one_backward(4, 2)) == "F0 F1 B0 B1\nF0 F1 B0 B1\nF0 F1 B0 B1\nF0 B0 F1 B1"
    assert to_text(gpipe(2, 2)) == "F0 F1 B0 B1\nF0 F1 B0 B1"


def test_golden_interleaved() -> None:
    # Derived by hand from §2.2 of arXiv 2104.04473: chunks 0 and 2 on stage 0, groups of two micro-batches.
    assert to_text(interleaved(2, 4)) == (
        "F0 F1 F0c2 F1c2 F2 B0c2 F3 B1c2 F2c2 B0 F3c2 B1 B2c2 B3c2 B2 B3\n"
        "F0 F1 F0c3 B0c3 F1c3 B1c3 F2 B0 F3 B1 F2c3 B2c3 F3c3 B3c3 B2 B3"
    )
    # Three micro-batches: the same without the fourth.
    assert to_text(interleaved(2, 3)).splitlines()[0] == "F0 F1 F0c2 F1c2 F2 B0c2 B1c2 F2c2 B0 B1 B2c2 B2"


def test_golden_zb_h1() -> None:
    # The upper part of figure 3 of arXiv 2401.10241 for its first and last stage: four in flight on both.
    lines = to_text(zb_h1(4, 6)).splitlines()
    assert lines[0] == "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5"
    assert lines[3] == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5"


def test_interleaved_with_one_chunk_is_1f1b() -> None:
    assert interleaved(3, 5, 1) == one_forward_one_backward(3, 5)


def test_the_v_has_both_ends_on_the_first_stage() -> None:
    for stage, actions in enumerate(zb_v(3, 6)):
        assert {action.chunk for action in actions} == {stage, 5 - stage}


@settings(deadline=None)
@given(ANY_SCHEDULE)
def test_text_round_trip(schedule: Schedule) -> None:
    assert from_text(to_text(schedule)) == schedule


def test_text_of_a_stage_without_actions_and_blank_lines() -> None:
    assert to_text(((), (Action(Kind.FORWARD, 2, 1), Action(Kind.BACKWARD_INPUT, 2, 4)))) == "-\nF2 I2c4"
    assert from_text("\n\nF0c3\n\n- \n") == ((Action(Kind.FORWARD, 0, 3),), ())


@pytest.mark.parametrize(
    "word", ["X0", "F", "F-1", "Fx", "f0", "0F", "F1.5", "F²", "F0c", "F0c-1", "Fc1", "F0c1c2", "--", "F0-"]
)
def test_words_that_are_no_actions(word: str) -> None:
    with pytest.raises(UserError, match=f"schedule: '{word}' is no action; expected F or B and a micro-batch number"):
        from_text(f"F0 {word} B0")


def test_differences_name_the_first_place_on_each_stage() -> None:
    left = from_text("F0 F1 B0 B1\nF0 B0 F1 B1\nF0 B0\nF0")
    right = from_text("F0 F1 B0 B1\nF0 F1c5 B0 B1\nF0 B0 F1\nF0")
    assert difference(left, right) == (
        "stage 1, position 1: B0 on the left, F1c5 on the right\n"
        "stage 2, position 2: nothing more on the left, F1 on the right"
    )
    assert difference(left, left[:3]) == "stage 3: only in the left schedule"
    assert difference(left[:3], left) == "stage 3: only in the right schedule"


@settings(deadline=None)
@given(ANY_SCHEDULE, ANY_SCHEDULE)
def test_no_difference_means_equal(left: Schedule, right: Schedule) -> None:
    assert difference(left, left) == ""
    assert (difference(left, right) == "") == (left == right)
