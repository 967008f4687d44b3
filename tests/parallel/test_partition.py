"""Which decoder layers each chunk holds. The oracle is trying all splits, for models small enough."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache

import pytest

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.generators import one_forward_one_backward
from tetrascope.parallel.pipeline.partition import balanced_split, check_layers, check_split, search_split
from tetrascope.parallel.pipeline.simulator import Costs, simulate


def loads(split: tuple[int, ...], first: float, last: float) -> list[float]:
    """Cost of every stage, in units of a decoder layer."""
    cost = [float(n) for n in split]
    cost[0] += first
    cost[-1] += last
    return cost


def all_splits(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, layers))) for cut in cuts]


@pytest.mark.parametrize("layers", range(1, 10))
@pytest.mark.parametrize(("first", "last"), [(0, 0), (2.5, 0), (0, 1.7), (3.2, 1.4), (0.3, 0.3), (20, 0), (0.5, 6)])
def test_no_split_is_better(layers: int, first: float, last: float) -> None:
    for stages in range(1, layers + 1):
        split = balanced_split(layers, stages, first, last)
        every = [loads(s, first, last) for s in all_splits(layers, stages)]
        ours = loads(tuple(split), first, last)
        assert len(split) == stages and sum(split) == layers and min(split) >= 1
        assert max(ours) == pytest.approx(min(max(cost) for cost in every))
        # And among those, none whose stages are more alike.
        best = min(sum(c * c for c in cost) for cost in every if max(cost) <= max(ours) + 1e-9)
        assert sum(c * c for c in ours) == pytest.approx(best)


def test_golden_splits() -> None:
    assert balanced_split(28, 4, 0, 0) == [7, 7, 7, 7]
    assert balanced_split(28, 4, 4, 0) == [4, 8, 8, 8]  # 32 units over four stages
    assert sorted(loads(tuple(balanced_split(80, 8, 3, 3)), 3, 3)) == [10] * 2 + [11] * 6  # 86 units over eight
    assert balanced_split(5, 1, 9, 9) == [5]
    assert balanced_split(4, 4, 100, 100) == [1, 1, 1, 1]


def test_large_models_split_at_once() -> None:
    split = balanced_split(126, 32, 2.0, 1.5)
    assert max(loads(tuple(split), 2.0, 1.5)) <= 5 and sum(split) == 126


@pytest.mark.parametrize(("layers", "chunks"), [(3, 4), (1, 2), (0, 1)])
def test_fewer_layers_than_chunks(layers: int, chunks: int) -> None:
    message = (
        rf"parallel\.pp: {chunks} chunks \(stages times virtual stages\) need at least {chunks} decoder layers, the "
        rf"model has {layers}; lower .* multiply to {layers} or less"
    )
    with pytest.raises(UserError, match=message):
        balanced_split(layers, chunks, 0, 0)
    with pytest.raises(UserError, match=message):
        check_layers(layers, chunks)
    with pytest.raises(UserError, match=message):
        check_split([1] * chunks, layers, chunks)


@pytest.mark.parametrize(
    ("split", "what"),
    [
        ([2, 3], "has 2 numbers"),
        ([1, 1, 1, 2], "has 4 numbers"),
        ([2, 2, 2], "adds up to 6"),
        ([5, 0, 0], "leaves chunk 1 without a layer"),
        ([3, 3, -1], "leaves chunk 2 without a layer"),
    ],
)
def test_splits_that_do_not_fit(split: list[int], what: str) -> None:
    with pytest.raises(UserError) as caught:
        check_split(split, 5, 3)
    assert str(caught.value) == (
        f"parallel.split: {split} {what}; expected 3 numbers (stages times virtual stages) of at least 1 that add up "
        "to 5 layers"
    )


def test_splits_that_fit() -> None:
    check_split([1, 3, 1], 5, 3)
    check_split([5], 5, 1)


@pytest.mark.parametrize("least", [2, 3, 4])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (2.5, 0), (20, 0), (0.5, 6)])
def test_no_split_with_enough_on_the_first_stage_is_better(least: int, first: float, last: float) -> None:
    for layers, stages in itertools.product(range(least, 9), range(1, 6)):
        if layers < least + stages - 1:
            with pytest.raises(UserError, match=rf"need at least {least + stages - 1} .* must hold {least}; lower"):
                balanced_split(layers, stages, first, last, least)
            continue
        split = balanced_split(layers, stages, first, last, least)
        allowed = [loads(s, first, last) for s in all_splits(layers, stages) if s[0] >= least]
        assert split[0] >= least and sum(split) == layers and len(split) == stages
        assert max(loads(tuple(split), first, last)) == pytest.approx(min(max(cost) for cost in allowed))


def test_a_split_with_too_few_layers_on_the_first_stage() -> None:
    check_split([3, 1, 1], 5, 3, first_least=3)
    with pytest.raises(UserError, match=r"parallel\.split: \[2, 2, 1\] gives the first chunk 2 layers, .* at least 3"):
        check_split([2, 2, 1], 5, 3, first_least=3)
    with pytest.raises(
        UserError, match=r"parallel\.pp: 4 chunks .* need at least 6 .*, since the first must hold 3; .* to 3 or"
    ):
        check_split([2, 1, 1, 1], 5, 4, first_least=3)


def makespan(stages: int, seed: int) -> Callable[[tuple[int, ...]], float]:
    """Seconds of 1F1B with a vision encoder before the first layers and a head after the last, for a split."""
    rng = random.Random(seed)
    pictures = [rng.randint(0, 6) * rng.random() for _ in range(6)]
    head = rng.random() * 4
    schedule = one_forward_one_backward(stages, len(pictures))

    def seconds(split: tuple[int, ...]) -> float:
        work = [[float(count)] * len(pictures) for count in split]
        work[0] = [split[0] + vision for vision in pictures]
        work[-1] = [cost + head for cost in work[-1]]
        return simulate(schedule, Costs(work, work, work, latency=0.1)).makespan

    return seconds


def test_search_against_all_splits() -> None:
    # Moving one or two layers at a time finds the best split of all in nearly all cases, and comes near it in the rest.
    found, cases = 0, 0
    for stages, layers, seed in itertools.product((2, 3, 4), (6, 9), range(5)):
        seconds = cache(makespan(stages, seed))
        start = balanced_split(layers, stages, 0, 0)
        split = tuple(search_split(start, seconds))
        best = min(seconds(other) for other in all_splits(layers, stages))
        assert sum(split) == layers and min(split) >= 1
        assert best <= seconds(split) <= min(seconds(tuple(start)), 1.02 * best)
        found, cases = found + (seconds(split) == best), cases + 1
    assert found >= 0.9 * cases


def test_search_keeps_what_chunks_must_have_and_asks_once() -> None:
    asked: list[tuple[int, ...]] = []

    def seconds(split: tuple[int, ...]) -> float:
        asked.append(split)
        return split[0] * 5 + split[1]

    assert search_split([4, 3, 3], seconds, least=[2, 1, 1]) == [2, 1, 7]
    assert len(asked) == len(set(asked))
    assert all(split[0] >= 2 and min(split) >= 1 and sum(split) == 10 for split in asked)


def test_search_with_few_tries() -> None:
    asked: list[tuple[int, ...]] = []

    def seconds(split: tuple[int, ...]) -> float:
        asked.append(split)
        return -float(split[-1])

    split = search_split([5] * 16, seconds, tries=50)
    assert len(asked) == 50
    assert seconds(tuple(split)) <= -5


def test_search_of_a_large_model_is_short() -> None:
    # 80 layers over 16 chunks: few splits are tried, though there are 10^16.
    asked: list[tuple[int, ...]] = []

    def seconds(split: tuple[int, ...]) -> float:
        asked.append(split)
        return max(loads(split, 7.3, 3.1)) + 1e-3 * sum(n * n for n in split)

    start = balanced_split(80, 16, 0, 0)
    split = search_split(start, seconds)
    assert max(loads(tuple(split), 7.3, 3.1)) == max(loads(tuple(balanced_split(80, 16, 7.3, 3.1)), 7.3, 3.1))
    assert len(asked) < 1500
