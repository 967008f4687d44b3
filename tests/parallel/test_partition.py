"""Which decoder layers each stage holds. The oracle is trying all splits, for models small enough."""

from __future__ import annotations

import itertools

import pytest

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.partition import balanced_split, check_layers, check_split, layer_ranges


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


@pytest.mark.parametrize(("layers", "stages"), [(3, 4), (1, 2), (0, 1)])
def test_fewer_layers_than_stages(layers: int, stages: int) -> None:
    message = f"parallel.pp: {stages} stages need at least {stages} decoder layers, the model has {layers}"
    with pytest.raises(UserError, match=message):
        balanced_split(layers, stages, 0, 0)
    with pytest.raises(UserError, match=message):
        check_layers(layers, stages)
    with pytest.raises(UserError, match=message):
        check_split([1] * stages, layers, stages)


@pytest.mark.parametrize("split", [[2, 3], [2, 2, 2], [5, 0, 0], [3, 3, -1], [1, 1, 1, 2]])
def test_splits_that_do_not_fit(split: list[int]) -> None:
    with pytest.raises(UserError, match=r"parallel\.split: .* must be 3 numbers of at least 1 that add up to 5 layers"):
        check_split(split, 5, 3)


def test_splits_that_fit_and_their_layers() -> None:
    check_split([1, 3, 1], 5, 3)
    assert layer_ranges([1, 3, 1]) == [range(0, 1), range(1, 4), range(4, 5)]


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
    with pytest.raises(UserError, match=r"parallel\.split: \[2, 2, 1\] gives the first stage 2 layers, .* at least 3"):
        check_split([2, 2, 1], 5, 3, first_least=3)
    with pytest.raises(UserError, match=r"parallel\.pp: 4 stages need at least 6 .*; lower parallel.pp to 3 or less"):
        check_split([2, 1, 1, 1], 5, 4, first_least=3)
