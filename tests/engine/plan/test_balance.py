"""Packs dealt to ranks: as many to each, both kinds of work even, small ones first and last."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.engine.plan.balance import even_out, pipeline_order, shares, to_ranks
from tetrascope.engine.plan.cost import Cost

COST = st.builds(Cost, st.floats(0, 1e15), st.floats(0, 1e15))


def worst(groups: list[list[int]], costs: list[Cost]) -> float:
    share = shares(costs, len(groups))
    return max(float(share[group].sum(0).max()) for group in groups)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_every_pack_is_dealt_once_and_as_many_to_each(ranks: int, each: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(COST, min_size=ranks * each, max_size=ranks * each))
    groups = to_ranks(costs, ranks)
    assert sorted(itertools.chain(*groups)) == list(range(ranks * each))
    assert {len(group) for group in groups} == {each}


@pytest.mark.parametrize("seed", range(20))
def test_close_to_the_best_of_all_ways(seed: int) -> None:
    """Two ranks with four packs each: every way can be tried."""
    rng = np.random.default_rng(seed)
    costs = [Cost(*pair) for pair in (rng.lognormal(0, 0.5, (8, 2))).tolist()]
    ways = ([list(way), [i for i in range(8) if i not in way]] for way in itertools.combinations(range(8), 4))
    best = min(worst(way, costs) for way in ways)
    assert worst(to_ranks(costs, 2), costs) <= 1.1 * best


def test_balance_of_many_unequal_packs() -> None:
    rng = np.random.default_rng(1)
    costs = [Cost(*pair) for pair in rng.lognormal(0, 0.6, (128, 2)).tolist()]
    dealt_in_turn = [list(range(rank, 128, 8)) for rank in range(8)]
    assert worst(dealt_in_turn, costs) > 1.2
    assert worst(to_ranks(costs, 8), costs) < 1.02


def test_one_kind_of_work_alone() -> None:
    costs = [Cost(float(i), 0.0) for i in range(1, 9)]
    assert worst(to_ranks(costs, 4), costs) == 1.0  # 1+8, 2+7, 3+6, 4+5


def test_swaps_respect_the_capacity() -> None:
    """Both swaps that even out the work best, to 1.1, would bring a group to 18 tokens; the next best comes to 1.2."""
    share, tokens = np.array([[1.0, 0], [0.5, 0], [0.2, 0], [0.1, 0]]), np.array([9, 1, 1, 9])

    def evened(*limits: object) -> tuple[float, int]:
        groups = [[0, 1], [2, 3]]
        even_out(groups, share, *limits)  # type: ignore[arg-type]
        return max(float(share[group, 0].sum()) for group in groups), max(int(tokens[group].sum()) for group in groups)

    assert evened() == (1.1, 18)
    assert evened(tokens, 10) == (1.2, 10)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), COST), min_size=3, max_size=40), st.integers(2, 5))
def test_many_swaps_respect_it_too(members: list[tuple[int, Cost]], count: int) -> None:
    tokens, costs = np.array([n for n, _ in members]), [cost for _, cost in members]
    groups = [list(range(number, len(members), count)) for number in range(min(count, len(members)))]
    capacity, before = max(int(tokens[group].sum()) for group in groups), worst(groups, costs)
    even_out(groups, shares(costs, len(groups)), tokens, capacity)
    assert sorted(itertools.chain(*groups)) == list(range(len(members)))
    assert max(int(tokens[group].sum()) for group in groups) <= capacity
    assert worst(groups, costs) <= before + 1e-9


def test_small_micro_batches_come_first_and_last() -> None:
    share = np.array([[w, 0] for w in (3.0, 1.0, 5.0, 2.0, 4.0)])
    order = pipeline_order([0, 1, 2, 3, 4], share)
    assert [share[pack, 0] for pack in order] == [1, 3, 5, 4, 2]
