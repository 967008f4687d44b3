"""Schedules made from schedules: still proven by the validator, and as long as those they come from where nothing but
the counting changes."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from tetrascope.parallel.pipeline.actions import Schedule, placement_of, to_text
from tetrascope.parallel.pipeline.generators import GENERATORS, one_forward_one_backward
from tetrascope.parallel.pipeline.placement import with_vision
from tetrascope.parallel.pipeline.simulator import Costs, simulate
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward, without_later
from tetrascope.parallel.pipeline.validator import validate
from tetrascope.parallel.pipeline.zero_bubble import zb_h1

SIZES = list(itertools.product(range(1, 5), (1, 3, 4, 9)))


def random_costs(chunks: int, micro_batches: int, seed: int) -> Costs:
    rng = random.Random(seed)
    tables = [[[rng.randint(1, 9) for _ in range(micro_batches)] for _ in range(chunks)] for _ in range(3)]
    return Costs(*tables, latency=rng.randint(0, 3))


def chunks_in(schedule: Schedule) -> int:
    return len(placement_of(schedule))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_valid_stays_valid(name: str, stages: int, micro_batches: int) -> None:
    made = GENERATORS[name](stages, micro_batches)
    buffers = 1 if name in ("interleaved", "zb-v") else 0
    for schedule in (made, with_vision_chunk(made)):
        for frozen in range(min(3, chunks_in(schedule))):
            less = without_backward(schedule, frozen)
            validate(less, micro_batches, frozen=frozen)
            validate(less, micro_batches, frozen=frozen, buffers=buffers)
            for fewer in range(1, micro_batches):
                validate(without_later(less, fewer), fewer, frozen=frozen, buffers=buffers)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_vision_chunk_changes_nothing_but_the_numbers(name: str) -> None:
    # The two parts of what was the first chunk take as long as it did, and nothing comes between them.
    for seed, (stages, micro_batches) in enumerate(SIZES):
        schedule = GENERATORS[name](stages, micro_batches)
        divided = with_vision_chunk(schedule)
        assert placement_of(divided) == with_vision(placement_of(schedule))
        costs = random_costs(chunks_in(divided), micro_batches, seed)

        def joined(table: list[list[int]]) -> list[list[int]]:
            return [[a + b for a, b in zip(table[0], table[1], strict=True)], *table[2:]]

        fields = ("forward", "backward_input", "backward_weight")
        whole = dataclasses.replace(costs, **{field: joined(getattr(costs, field)) for field in fields})
        assert simulate(divided, costs).makespan == simulate(schedule, whole).makespan
        assert simulate(divided, costs).busy == simulate(schedule, whole).busy


@pytest.mark.parametrize("name", GENERATORS)
def test_a_backward_that_vanishes_is_as_one_that_takes_no_time(name: str) -> None:
    for seed, (stages, micro_batches) in enumerate(SIZES):
        schedule = with_vision_chunk(GENERATORS[name](stages, micro_batches))
        costs = random_costs(chunks_in(schedule), micro_batches, seed)
        nothing = [0] * micro_batches
        free = dataclasses.replace(
            costs,
            backward_input=[nothing, *costs.backward_input[1:]],
            backward_weight=[nothing, *costs.backward_weight[1:]],
        )
        assert simulate(without_backward(schedule, 1), costs).makespan == simulate(schedule, free).makespan


def test_golden() -> None:
    assert to_text(without_later(one_forward_one_backward(2, 3), 2)) == "F0 F1 B0 B1\nF0 B0 F1 B1"
    vision = with_vision_chunk(one_forward_one_backward(2, 2))
    assert to_text(vision) == "F0 F0c1 F1 F1c1 B0c1 B0 B1c1 B1\nF0c2 B0c2 F1c2 B1c2"
    assert to_text(without_backward(vision, 1)) == "F0 F0c1 F1 F1c1 B0c1 B1c1\nF0c2 B0c2 F1c2 B1c2"
    assert to_text(without_backward(zb_h1(2, 2), 1)) == "F0 F1\nF0 I0 F1 I1 W0 W1"
    assert without_backward(vision, 0) == vision
