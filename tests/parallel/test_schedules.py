"""Pipeline schedules: generators, their text form, and the validator.

The validator is checked against a simulation written here in another way: each stage is a queue, channels between
stages are first in, first out and carry no names, as in the executor. A schedule that the validator accepts must run
to the end there with every receive getting the micro-batch it is for.
"""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule, from_text, to_text, validate
from tetrascope.parallel.pipeline.generators import SCHEDULES, gpipe, one_forward_one_backward

SIZES = list(itertools.product(range(1, 7), range(1, 10)))  # stages and micro-batches, fewer of these than stages too


def runs(schedule: Schedule) -> bool:
    """Whether the executor would come to the end with the right micro-batch in every receive."""
    last = len(schedule) - 1
    queues = [deque(actions) for actions in schedule]
    activations: list[deque[int]] = [deque() for _ in schedule]  # what waits in front of each stage
    gradients: list[deque[int]] = [deque() for _ in schedule]
    kept: list[set[int]] = [set() for _ in schedule]
    while True:
        moved = False
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            action = queue[0]
            forward = action.kind is Kind.FORWARD
            inbox = activations[stage] if forward else gradients[stage]
            receives = stage > 0 if forward else stage < last
            if receives and not inbox:
                continue
            if receives and inbox.popleft() != action.micro_batch:
                return False
            if not forward and action.micro_batch not in kept[stage]:
                return False
            if forward:
                kept[stage].add(action.micro_batch)
                if stage < last:
                    activations[stage + 1].append(action.micro_batch)
            else:
                kept[stage].remove(action.micro_batch)
                if stage:
                    gradients[stage - 1].append(action.micro_batch)
            queue.popleft()
            moved = True
        if not moved:
            return not any(queues)


def in_flight(actions: tuple[Action, ...]) -> int:
    """The most micro-batches whose activations a stage holds at once."""
    held = itertools.accumulate(1 if action.kind is Kind.FORWARD else -1 for action in actions)
    return max(held)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_generated_schedules_are_valid_and_run(name: str, stages: int, micro_batches: int) -> None:
    schedule = SCHEDULES[name](stages, micro_batches)
    assert len(schedule) == stages
    validate(schedule, micro_batches)
    assert runs(schedule)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_memory_of_1f1b(stages: int, micro_batches: int) -> None:
    # PipeDream-Flush (arXiv 2006.09503 §3): stage s holds stages − s micro-batches, as many as fit into the way of a
    # micro-batch to the last stage and back.
    schedule = one_forward_one_backward(stages, micro_batches)
    assert [in_flight(a) for a in schedule] == [min(stages - s, micro_batches) for s in range(stages)]


def test_memory_of_gpipe() -> None:
    assert [in_flight(actions) for actions in gpipe(3, 7)] == [7, 7, 7]


def test_golden_1f1b() -> None:
    # Figure 4 of arXiv 2104.04473, for three stages and five micro-batches.
    assert to_text(one_forward_one_backward(3, 5)) == (
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4\nF0 F1 B0 F2 B1 F3 B2 F4 B3 B4\nF0 B0 F1 B1 F2 B2 F3 B3 F4 B4"
    )


def test_golden_with_fewer_micro_batches_than_stages() -> None:
    assert to_text(one_forward_one_backward(4, 2)) == "F0 F1 B0 B1\nF0 F1 B0 B1\nF0 F1 B0 B1\nF0 B0 F1 B1"
    assert to_text(gpipe(2, 2)) == "F0 F1 B0 B1\nF0 F1 B0 B1"


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_round_trip(name: str) -> None:
    for stages, micro_batches in ((1, 1), (3, 2), (4, 12)):
        schedule = SCHEDULES[name](stages, micro_batches)
        assert from_text(to_text(schedule)) == schedule


@pytest.mark.parametrize("word", ["X0", "F", "F-1", "Fx", "f0", "0F", "F1.5", "F²"])
def test_words_that_are_no_actions(word: str) -> None:
    with pytest.raises(UserError, match=f"schedule: '{word}' is no action; expected F or B and a micro-batch number"):
        from_text(f"F0 {word} B0")


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("F0 F1 B0 B1\nF0 B0 F1", 1),  # a missing action
        ("F0 F1 B0\nF0 B0 F1 B1", 0),
        ("F0 F1 F1 B0 B1\nF0 B0 F1 B1", 0),  # one that comes twice
        ("F0 F1 B0 B0\nF0 B0 F1 B1", 0),
        ("F0 F1 B0 B1\nF0 B0 F1 B2", 1),  # one of a micro-batch that there is not
        ("F0 F1 F2 B0 B1 B2\nF0 B0 F1 B1 F2 B2", 0),
    ],
)
def test_incomplete_schedules_name_the_stage(text: str, stage: int) -> None:
    with pytest.raises(UserError, match=f"schedule: stage {stage} must forward and backward each of 2 micro-batches"):
        validate(from_text(text), 2)


@pytest.mark.parametrize(
    ("text", "stuck"),
    [
        ("B0 F0\nF0 B0", "stage 0 at B0, stage 1 at F0"),  # a backward before its own forward
        ("F0 B0\nB0 F0", "stage 0 at B0, stage 1 at B0"),
        ("F0 B0 F1 B1\nF0 F1 B0 B1", "stage 0 at B0, stage 1 at F1"),  # each waits for the other
    ],
)
def test_deadlocks_name_where_each_stage_waits(text: str, stuck: str) -> None:
    schedule = from_text(text)
    with pytest.raises(UserError, match=f"schedule: deadlock, {stuck}$"):
        validate(schedule, len(schedule[0]) // 2)


@pytest.mark.parametrize(
    "text",
    [
        "F0 F1 B0 B1\nF1 F0 B0 B1",  # stage 1 would take micro-batch 0 for 1
        "F0 F1 B0 B1\nF0 F1 B1 B0",
        "F0 F1 B0 B1\nF0 F1 B0 B1\nF1 B1 F0 B0",
    ],
)
def test_stages_that_would_mix_up_micro_batches(text: str) -> None:
    assert not runs(from_text(text))
    with pytest.raises(UserError, match=r"schedule: stages 0 and \d do the (forward|backward)s .* different orders"):
        validate(from_text(text), 2)


def test_an_order_that_all_stages_share_need_not_be_rising() -> None:
    validate(from_text("F1 F0 B1 B0\nF1 B1 F0 B0"), 2)


@pytest.mark.parametrize("seed", range(20))
def test_validator_accepts_just_what_runs(seed: int) -> None:
    # Complete schedules with a few neighbouring actions swapped: some still run, some do not. A backward may overtake
    # or stay behind; what the validator says must be what the simulation finds.
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(40):
        schedule = [list(actions) for actions in SCHEDULES[rng.choice(list(SCHEDULES))](rng.randint(1, 4), 4)]
        for _ in range(rng.randint(0, 4)):
            actions = rng.choice(schedule)
            i = rng.randrange(len(actions) - 1)
            actions[i], actions[i + 1] = actions[i + 1], actions[i]
        changed = tuple(tuple(actions) for actions in schedule)
        try:
            validate(changed, 4)
            valid = True
        except UserError:
            valid = False
        assert runs(changed) == valid
        verdicts.add(valid)
    assert verdicts == {True, False}
