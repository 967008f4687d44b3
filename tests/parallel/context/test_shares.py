"""Rows of documents on ring ranks: exact sums, fair rounding, as many documents whole as balance allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.parallel.context.shares import GOOD_BALANCE, apportion, balance, ring_shares


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 9), st.integers(0, 9), st.integers(0, 64))
def test_sums_are_exact(lengths: list[int], ring: int, extra: int, chunk: int) -> None:
    ring_rows = -(-(sum(lengths) + extra) // ring)
    shares_RD = ring_shares(lengths, ring, ring_rows, chunk, 0.0)
    assert shares_RD.shape == (ring, len(lengths) + 1) and (shares_RD >= 0).all()
    assert (shares_RD.sum(1) == ring_rows).all()
    assert shares_RD.sum(0)[:-1].tolist() == lengths


def test_rounding_does_not_favour_a_rank() -> None:
    """Thirty documents of 10 rows over 4 ranks, 2 or 3 rows each: after every one the ranks are within a row."""
    shares_RD = ring_shares([10] * 30, 4, 75, chunk=0, row_pairs=0.0)
    so_far_RD = shares_RD[:, :-1].cumsum(1)
    assert np.ptp(so_far_RD, axis=0).max() == 1


def test_most_documents_stay_whole_where_none_is_long() -> None:
    """32k rows of documents of 50 to 2000, on 8 ranks. Found by weighing a document by the work it lacks; by rows alone
    a quarter would stay whole."""
    generator = np.random.default_rng(0)
    whole = []
    for _ in range(10):
        lengths_D = np.exp(generator.uniform(np.log(50), np.log(2000), size=60)).astype(np.int64)
        shares_RD = ring_shares(lengths_D.tolist(), 8, -(-int(lengths_D.sum()) // 8), 128, 0.0)
        assert balance(shares_RD, lengths_D) <= GOOD_BALANCE
        whole.append(((shares_RD[:, :-1] > 0).sum(0) == 1).mean())
    assert np.mean(whole) > 0.6


@pytest.mark.parametrize(
    ("owed", "room", "total", "expected"),
    [
        ([1.5, 1.2, 0.3], [9, 9, 9], 3, [2, 1, 0]),
        ([1.5, 1.2, 0.3], [1, 9, 9], 3, [1, 1, 1]),
        ([4.0, 0.0, 0.0], [1, 2, 1], 4, [1, 2, 1]),
        ([2.9, 2.8, -1.7], [9, 9, 9], 3, [2, 1, 0]),
        ([0.0, 0.0], [0, 0], 0, [0, 0]),
    ],
)
def test_apportion(owed: list[float], room: list[int], total: int, expected: list[int]) -> None:
    assert apportion(np.array(owed), np.array(room), total).tolist() == expected


def test_balance_of_nothing_is_perfect() -> None:
    assert balance(np.array([[0, 4], [0, 4]]), np.array([0])) == 1.0
