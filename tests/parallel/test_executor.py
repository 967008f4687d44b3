"""The executor runs any valid schedule and computes what one process without a pipeline does.

Schedules are those of the generators and random ones, made from them by exchanging actions as long as the validator
allows it. Every chunk has a loss of its own beside the last one's, so that gradients are born on every stage.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.parallel.executor_jobs import frozen_inputs, held, one_process, pipeline, posted
from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Kind, Schedule, placement_of, to_text
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward
from tetrascope.parallel.pipeline.validator import validate
from tetrascope.tools.verify.pool import WorkerPool


def check(pool: WorkerPool, schedule: Schedule, micro_batches: int, frozen: int = 0) -> None:
    """Compares with one process; gradients and the loss are sums of a few dozen fp32 terms of size one."""
    chunks = len(placement_of(schedule))
    total, expected = one_process(chunks, micro_batches, frozen)
    ranks = pool.run(pipeline, schedule, micro_batches, frozen, world=len(schedule))
    assert sum(sum(losses) for losses, _, _ in ranks) == pytest.approx(total, rel=1e-5)
    seen = {}
    for _, gradients, _ in ranks:
        seen |= gradients
    assert sorted(seen) == list(range(chunks))
    for chunk, grads in seen.items():
        for found, wanted in zip(grads, expected[chunk], strict=True):
            assert (found is None) == (wanted is None), to_text(schedule)
            if found is not None and wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def shuffled(schedule: Schedule, micro_batches: int, frozen: int, rng: random.Random, swaps: int = 60) -> Schedule:
    """A valid schedule near another one: neighbouring actions exchanged at random, kept where it stays valid."""
    lines = [list(actions) for actions in schedule]
    for _ in range(swaps):
        actions = rng.choice(lines)
        i = rng.randrange(len(actions) - 1)
        actions[i], actions[i + 1] = actions[i + 1], actions[i]
        try:
            validate(tuple(map(tuple, lines)), micro_batches, frozen=frozen)
        except UserError:
            actions[i], actions[i + 1] = actions[i + 1], actions[i]
    return tuple(map(tuple, lines))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators(pool: WorkerPool, name: str, stages: int) -> None:
    check(pool, GENERATORS[name](stages, 5), 5)


@pytest.mark.parametrize("virtual_stages", [2, 3])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 5), (4, 6), (2, 1)])
def test_interleaved(pool: WorkerPool, stages: int, micro_batches: int, virtual_stages: int) -> None:
    check(pool, GENERATORS["interleaved"](stages, micro_batches, virtual_stages), micro_batches)


@pytest.mark.parametrize("seed", range(12))
def test_any_valid_schedule(pool: WorkerPool, seed: int) -> None:
    rng = random.Random(seed)
    name = list(GENERATORS)[seed % len(GENERATORS)]
    stages, micro_batches, frozen = rng.choice([2, 3, 4]), rng.choice([3, 4, 6]), rng.choice([0, 0, 1, 2])
    base = GENERATORS[name](stages, micro_batches)
    if rng.random() < 0.5:
        base = with_vision_chunk(base)
    base = without_backward(base, frozen)
    changed = shuffled(base, micro_batches, frozen, rng)
    assert changed != base
    check(pool, changed, micro_batches, frozen)


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_chunks_have_no_backward(pool: WorkerPool, frozen: int) -> None:
    # Two of the three chunks in front lie on one stage, so that what they hand on goes both ways.
    schedule = without_backward(with_vision_chunk(GENERATORS["1f1b"](3, 4)), frozen)
    assert not any(a.chunk < frozen and a.kind is not Kind.FORWARD for actions in schedule for a in actions)
    check(pool, schedule, 4, frozen)


def test_what_is_recorded(pool: WorkerPool) -> None:
    schedule = GENERATORS["zb-h1"](2, 3)
    for stage, (_, _, spans) in enumerate(pool.run(pipeline, schedule, 3, 0, True, world=2)):
        assert tuple(span.action for span in spans) == schedule[stage]
        assert all(0 <= span.asked <= span.start <= span.end for span in spans)
        assert all(a.end <= b.asked for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_what_was_sent_is_let_go(pool: WorkerPool, name: str) -> None:
    # A transfer that was answered is over: only those that are under way, a pair of them a neighbour, are held.
    micro_batches = 12
    for outputs, gradients in pool.run(held, GENERATORS[name](3, micro_batches), micro_batches, world=3):
        assert max(outputs, default=0) <= 4 and max(gradients, default=0) <= 4, (outputs, gradients)


def test_nothing_is_kept_of_frozen_chunks(pool: WorkerPool) -> None:
    schedule = without_backward(GENERATORS["gpipe"](4, 8), 2)
    _, second, third, last = pool.run(frozen_inputs, schedule, 8, 2, world=4)
    assert len(second[0]) == 8 and max(second[0]) <= 2
    assert [learning for _, learning in (second, third, last)] == [{(1, False)}, {(2, False)}, {(3, True)}]


def test_a_receive_is_posted_when_its_sender_needs_no_more(pool: WorkerPool) -> None:
    # The first gradient comes after all three micro-batches have gone through the last stage, in any case.
    first, last = pool.run(posted, GENERATORS["gpipe"](2, 3), 3, world=2)
    assert first == [3, 3, 3]
    assert last == [0, 0, 1]  # one ahead, from the start
