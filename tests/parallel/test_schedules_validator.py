"""The validator of pipeline schedules.

It is checked against a simulation written here in another way: each stage is a queue, channels between stages are
first in, first out and carry no names, as in the executor. A schedule that the validator accepts must run to the end
there with every receive getting the micro-batch and chunk it is for.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque

import pytest

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule, from_text
from tetrascope.parallel.pipeline.generators import GENERATORS, interleaved, one_forward_one_backward
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward
from tetrascope.parallel.pipeline.validator import live_activations, validate

Tag = tuple[int, int]
"""A micro-batch and the chunk that it is sent to."""


def runs(schedule: Schedule) -> bool:
    """Whether the executor would come to the end with the right micro-batch in every receive."""
    home = {action.chunk: stage for stage, actions in enumerate(schedule) for action in actions}
    trained = {action.chunk for actions in schedule for action in actions if action.kind is not Kind.FORWARD}
    queues = [deque(actions) for actions in schedule]
    channels: dict[tuple[int, int, int], deque[Tag]] = defaultdict(deque)  # direction, from, to
    local: set[tuple[int, Tag]] = set()  # what a chunk left for another of the same stage
    forwarded: set[Tag] = set()
    waiting_weights: set[Tag] = set()

    def give(direction: int, stage: int, tag: Tag) -> None:
        there = home.get(tag[1])
        if direction < 0 and tag[1] not in trained:
            return  # nobody asks for this gradient
        if there == stage:
            local.add((direction, tag))
        elif there is not None:
            channels[direction, stage, there].append(tag)

    def take(direction: int, stage: int, tag: Tag) -> str:
        source = home.get(tag[1] - direction)
        if source is None:
            return "there"
        if source == stage:
            return "there" if (direction, tag) in local else "not yet"
        channel = channels[direction, source, stage]
        if not channel:
            return "not yet"
        return "there" if channel.popleft() == tag else "wrong"

    def step(stage: int, action: Action) -> str:
        tag = (action.micro_batch, action.chunk)
        if action.kind is Kind.BACKWARD_WEIGHT:
            return "there" if tag in waiting_weights else "wrong"
        direction = 1 if action.kind is Kind.FORWARD else -1
        if direction < 0 and tag not in forwarded:
            return "wrong"
        found = take(direction, stage, tag)
        if found == "there":
            if direction > 0:
                forwarded.add(tag)
            if action.kind is Kind.BACKWARD_INPUT:
                waiting_weights.add(tag)
            give(direction, stage, (tag[0], tag[1] + direction))
        return found

    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                found = step(stage, queue[0])
                if found == "wrong":
                    return False
                if found == "not yet":
                    break
                queue.popleft()
                moved = True
    return not any(queues)


def accepts(schedule: Schedule, micro_batches: int, frozen: int = 0) -> bool:
    try:
        validate(schedule, micro_batches, frozen=frozen)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_schedules_run(name: str) -> None:
    for stages in range(1, 6):
        for micro_batches in (1, 2, 5, 8, 12):
            schedule = GENERATORS[name](stages, micro_batches)
            assert accepts(schedule, micro_batches)
            assert runs(schedule)


@pytest.mark.parametrize("vision_chunk", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_accepts_just_what_runs(name: str, vision_chunk: bool) -> None:
    # Complete schedules with a few neighbouring actions swapped: some still run, some do not. A backward may overtake
    # or stay behind; what the validator says must be what the simulation finds.
    rng = random.Random(name)
    verdicts = set()
    for _ in range(300):
        made = GENERATORS[name](rng.randint(1, 4), 4)
        if vision_chunk:
            made = with_vision_chunk(made)
        frozen = rng.choice([0, 0, 1, 2])
        chunks = 1 + max(action.chunk for actions in made for action in actions)
        frozen = min(frozen, chunks - 1)
        schedule = [list(actions) for actions in without_backward(made, frozen)]
        for _ in range(rng.randint(0, 4)):
            actions = rng.choice(schedule)
            i = rng.randrange(len(actions) - 1)
            actions[i], actions[i + 1] = actions[i + 1], actions[i]
        changed = tuple(tuple(actions) for actions in schedule)
        assert runs(changed) == accepts(changed, 4, frozen)
        verdicts.add(runs(changed))
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0 F1 B0 B1\nF0 B0 F1", "stage 1 ends at position 3 without B1"),
        ("F0 F1 B0\nF0 B0 F1 B1", "stage 0 ends at position 3 without B1"),
        ("F0 B0 B1\nF0 B0 F1 B1", "stage 0 ends at position 3 without F1"),
        ("F0 I0 F1 B1 \nF0 B0 F1 B1", "stage 0 ends at position 4 without W0"),
        ("F0 W0 F1 B1 \nF0 B0 F1 B1", "stage 0 ends at position 4 without I0"),
        ("F0 F1 F1 B0 B1\nF0 B0 F1 B1", "stage 0, position 2, F1: position 1 has F1 already"),
        ("F0 F1 B0 B0\nF0 B0 F1 B1", "stage 0, position 3, B0: position 2 has B0 already"),
        ("F0 I0 W0 B0 F1 B1\nF0 B0 F1 B1", "stage 0, position 3, B0: position 1 has I0 already"),
        ("F0 B0 W0 F1 B1\nF0 B0 F1 B1", "stage 0, position 2, W0: position 1 has B0 already"),
        ("F0 F1 B0 B1\nF0 B0 F1 B2", "stage 1, position 3, B2: there are 2 micro-batches, counted from 0"),
        ("F0 F1 B0 B1\nF0c0 F1c0 B0c0 B1c0", "stage 1, position 0, F0c0: chunk 0 has its place on stage 0"),
        ("F0 F1 B0 B1\n-", "stage 1 has no action; each needs a chunk of the model"),
        ("F0 F1 B0 B1\nF0c2 B0c2 F1c2 B1c2", "chunk 1 is on no stage, though there are later ones"),
    ],
)
def test_incomplete_schedules_name_the_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(from_text(text), 2)
    assert str(caught.value) == f"schedule: {message}"


@pytest.mark.parametrize(
    ("text", "stuck"),
    [
        (  # a backward before its own forward
            "B0 F0\nF0 B0",
            "stage 0, position 0, B0 waits for stage 0, position 1, F0; "
            "stage 1, position 0, F0 waits for stage 0, position 1, F0",
        ),
        (  # each waits for the other
            "F0 B0 F1 B1\nF0 F1 B0 B1",
            "stage 0, position 1, B0 waits for stage 1, position 2, B0; "
            "stage 1, position 1, F1 waits for stage 0, position 2, F1",
        ),
        ("F0 W0 I0", "stage 0, position 1, W0 waits for stage 0, position 2, I0"),
        ("F0c1 B0c1 F0 B0", "stage 0, position 0, F0c1 waits for stage 0, position 2, F0"),  # chunks of one stage
    ],
)
def test_deadlocks_name_who_waits_for_whom(text: str, stuck: str) -> None:
    schedule = from_text(text)
    with pytest.raises(UserError) as caught:
        validate(schedule, 2 if "F1" in text else 1)
    assert str(caught.value) == f"schedule: deadlock; {stuck}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0 F1 B0 B1\nF1 F0 B0 B1", "stage 1, position 0, F1 would receive what stage 0 sends for F0"),
        ("F0 F1 B0 B1\nF0 F1 B1 B0", "stage 0, position 2, B0 would receive what stage 1 sends for B1"),
        ("F0 F1 I0 W0 I1 W1\nF0 F1 B1 B0", "stage 0, position 2, I0 would receive what stage 1 sends for I1"),
    ],
)
def test_stages_that_would_mix_up_micro_batches(text: str, message: str) -> None:
    assert not runs(from_text(text))
    with pytest.raises(UserError, match=f"schedule: {message}; transfers carry no names"):
        validate(from_text(text), 2)


def test_chunks_that_would_be_mixed_up() -> None:
    # Stage 0 runs its second chunk before the second micro-batch of its first; stage 1 expects the opposite.
    text = "F0 F0c2 F1 F1c2 B0c2 B1c2 B0 B1\nF0 F1 F0c3 F1c3 B0c3 B1c3 B0 B1"
    assert not runs(from_text(text))
    with pytest.raises(UserError, match="stage 1, position 1, F1 would receive what stage 0 sends for F0c3"):
        validate(from_text(text), 2)


def test_an_order_that_all_stages_share_need_not_be_rising() -> None:
    validate(from_text("F1 F0 B1 B0\nF1 B1 F0 B0"), 2)


def test_full_and_split_backwards_side_by_side() -> None:
    validate(from_text("F0 F1 B0 I1 W1\nF0 I0 F1 B1 W0"), 2)


def test_buffers() -> None:
    # With sends that block, stage 0 must get rid of F2 before it takes B0, and stage 1 of B0 before it asks for F2.
    schedule = from_text("F0 F1 F2 F3 B0 B1 B2 B3\nF0 B0 F1 B1 F2 B2 F3 B3")
    validate(schedule, 4)
    validate(schedule, 4, buffers=1)
    with pytest.raises(UserError) as caught:
        validate(schedule, 4, buffers=0)
    assert str(caught.value) == (
        "schedule: deadlock; stage 0, position 3, F3 waits for stage 1, position 4, F2; "
        "stage 1, position 2, F1 waits for stage 0, position 4, B0"
    )
    validate(one_forward_one_backward(4, 9), 9, buffers=0)
    with pytest.raises(UserError, match="deadlock"):
        validate(interleaved(2, 4), 4, buffers=0)


def test_memory_bound() -> None:
    schedule = one_forward_one_backward(3, 5)
    validate(schedule, 5, max_live=3)
    validate(schedule, 5, max_live=[3, 2, 1])
    with pytest.raises(UserError) as caught:
        validate(schedule, 5, max_live=[3, 1, 1])
    assert str(caught.value) == "schedule: stage 1, position 1, F1 makes 2 live activations; the stage may hold 1"
    # A backward in two parts ends with the second.
    validate(from_text("F0 I0 W0 F1 I1 W1"), 2, max_live=1)
    with pytest.raises(UserError, match="stage 0, position 2, F1 makes 2 live activations"):
        validate(from_text("F0 I0 F1 W0 I1 W1"), 2, max_live=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (  # a backward that there must not be
            "F0 B0 F1\nF0 B0 F1 B1",
            "stage 0, position 1, B0: nothing in chunk 0 or before it is trained; take the action out",
        ),
        (
            "F0 W0 F1\nF0 B0 F1 B1",
            "stage 0, position 1, W0: nothing in chunk 0 or before it is trained; take the action",
        ),
        ("F0 F1\nF0 B0 F1", "stage 1 ends at position 3 without B1"),
        ("F0\nF0 B0 F1 B1", "stage 0 ends at position 1 without F1"),
    ],
)
def test_chunks_without_a_backward(text: str, message: str) -> None:
    validate(from_text("F0 F1\nF0 B0 F1 B1"), 2, buffers=0, frozen=1)
    with pytest.raises(UserError) as caught:
        validate(from_text(text), 2, frozen=1)
    assert str(caught.value).startswith(f"schedule: {message}")


def test_a_frozen_chunk_must_be_declared() -> None:
    with pytest.raises(UserError, match="stage 0 ends at position 2 without B0"):
        validate(from_text("F0 F1\nF0 B0 F1 B1"), 2)


def test_chunks_without_a_backward_hold_no_activation() -> None:
    # Chunk 0 runs ahead of chunk 1, on the same stage; only the latter's backward is waited for.
    schedule = from_text("F0 F1 F2 F0c1 I0c1 W0c1 F1c1 F2c1 B1c1 B2c1")
    validate(schedule, 3, max_live=2, frozen=1)
    assert live_activations(schedule[0]) == [0, 0, 0, 1, 1, 0, 1, 2, 1, 0]
