"""Token sharding against the definition of packed attention.

The oracle is the mask itself: row i sees row j when both are of one document and, if causal, j ≤ i. Every block of
every rank and ring step is painted into a matrix over the pack; each pair of the mask must be painted exactly once, and
no other. A wrong chunk order, an off-by-one at a border or a chunk that sees the future shows as a difference.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.errors import UserError
from tetrascope.parallel.context.shares import balance
from tetrascope.parallel.context.tokens import Block, TokenSharding, shard_tokens

DEGREES = st.sampled_from([1, 2, 3, 4, 8])
SMALL_DOCUMENTS = st.lists(st.integers(1, 40), max_size=8)


def paint(block: Block, q_rows: np.ndarray, k_rows: np.ndarray, seen_QK: np.ndarray) -> None:
    """Adds a block's pairs to a matrix over the rows of the pack; q_rows, k_rows: the pack's rows in the buffers."""
    mask = np.ones((block.q_rows, block.k_rows), dtype=np.int64)
    if block.causal:
        mask = np.tril(mask, block.k_rows - block.q_rows)
    q = q_rows[block.q_start :][: block.q_rows]
    k = k_rows[block.k_start :][: block.k_rows]
    assert len(q) == block.q_rows > 0 and len(k) == block.k_rows > 0
    seen_QK[np.ix_(q, k)] += mask


def expected(sharding: TokenSharding, causal: bool) -> np.ndarray:
    """The mask of packed attention over the documents. The padding of each ring rank is a document of its own: it sees
    something, since a softmax of nothing is NaN, but nothing of another rank."""
    mask, start = np.zeros((sharding.total, sharding.total), dtype=np.int64), 0
    for n in (*sharding.lengths, *sharding.shares_RD[:, -1].tolist()):
        mask[start : start + n, start : start + n] = np.tril(np.ones((n, n))) if causal else 1
        start += n
    return mask


def ring_rows_of(sharding: TokenSharding, rank: int) -> np.ndarray:
    """The pack's rows on a ring rank: those of its Ulysses group, in their order."""
    ranks = range(rank * sharding.ulysses, (rank + 1) * sharding.ulysses)
    return np.concatenate([sharding.rows_of(c) for c in ranks])


@settings(max_examples=60, deadline=None)
@given(SMALL_DOCUMENTS, DEGREES, DEGREES, st.sampled_from([1, 2]), st.integers(0, 9), st.sampled_from([0, 1, 3, 128]))
def test_every_pair_is_computed_once(
    lengths: list[int], ring: int, ulysses: int, tp: int, extra: int, chunk: int
) -> None:
    sharding = shard_tokens(lengths, ring, ulysses, tp, rows=sum(lengths) + extra, chunk=chunk)
    for causal in (True, False):
        by_ring = np.zeros((sharding.total, sharding.total), dtype=np.int64)
        by_gather = by_ring.copy()
        for rank in range(ring):
            q_rows = ring_rows_of(sharding, rank)
            for step, blocks in enumerate(sharding.ring_blocks(rank, causal)):
                assert all(block.causal == (causal and step == 0) for block in blocks)
                for block in blocks:
                    paint(block, q_rows, ring_rows_of(sharding, (rank - step) % ring), by_ring)
            for block in sharding.gathered_blocks(rank, causal):
                paint(block, q_rows, np.arange(sharding.total), by_gather)
        for seen in (by_ring, by_gather):
            np.testing.assert_array_equal(seen, expected(sharding, causal))


@settings(max_examples=60, deadline=None)
@given(SMALL_DOCUMENTS, DEGREES, DEGREES, st.sampled_from([1, 2, 4]), st.integers(0, 50))
def test_rows_come_back(lengths: list[int], ring: int, ulysses: int, tp: int, extra: int) -> None:
    sharding = shard_tokens(lengths, ring, ulysses, tp, rows=sum(lengths) + extra)
    rows = np.arange(sharding.total)
    np.testing.assert_array_equal(sharding.order[sharding.inverse], rows)
    np.testing.assert_array_equal(sharding.inverse[sharding.order], rows)
    parts = [sharding.rows_of(c) for c in range(ring * ulysses)]
    assert {len(part) for part in parts} == {sharding.rank_rows} and sharding.rank_rows % tp == 0
    assert sharding.padding - extra in range(ring * ulysses * tp)  # never more than divisibility asks for
    for rank in range(ring):
        assert sum(sharding.local_lengths(rank)) == sharding.ring_rows


@settings(max_examples=60, deadline=None)
@given(SMALL_DOCUMENTS, DEGREES)
def test_blocks_of_a_step_fit_one_kernel_call(lengths: list[int], ring: int) -> None:
    """In order and disjoint in q and in k, so that they are the sequences of one call."""
    sharding = shard_tokens(lengths, ring, 1, chunk=1)
    for rank in range(ring):
        for blocks in sharding.ring_blocks(rank):
            for before, after in itertools.pairwise(blocks):
                assert before.q_start + before.q_rows <= after.q_start
                assert before.k_start + before.k_rows <= after.k_start


def test_one_document_is_the_textbook_zigzag() -> None:
    """16 rows over ring 2 × Ulysses 2: eight-row halves [0,3,4,7] would be LongVILA's mistake; right is [0,1,6,7]."""
    sharding = shard_tokens([16], ring=2, ulysses=2)
    parts = [sharding.rows_of(c).tolist() for c in range(4)]
    assert parts == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert sharding.ring_blocks(0) == ((Block(0, 8, 0, 8, True),), (Block(4, 4, 0, 8, False),))
    assert sharding.ring_blocks(1) == ((Block(0, 8, 0, 8, True),), (Block(0, 8, 0, 4, False),))
    assert sharding.gathered_blocks(0) == (Block(0, 4, 0, 4, True), Block(4, 4, 0, 16, True))
    assert sharding.gathered_blocks(1) == (Block(0, 8, 0, 12, True),)


def test_short_documents_stay_whole_beside_a_long_one() -> None:
    """Where they do, the long one is divided unequally, so that rows stay equal and so does work."""
    lengths = [500, 12000, 480, 460, 440]
    sharding = shard_tokens(lengths, ring=4, ulysses=1)
    ranks_D = (sharding.shares_RD[:, :-1] > 0).sum(0)
    assert ranks_D.tolist() == [1, 4, 1, 1, 1]
    assert np.ptp(sharding.shares_RD[:, 1]) >= 59
    assert sharding.balance <= 1.02


def test_equal_short_documents_need_no_ring() -> None:
    sharding = shard_tokens([300] * 8, ring=4, ulysses=1)
    assert sharding.padding == 0 and sharding.balance == 1
    assert all(not any(sharding.ring_blocks(rank)[1:]) for rank in range(4))


def realistic(draws: list[float], total: int) -> list[int]:
    """Documents of 50 to 16384 rows, log-uniform, until `total` rows are full."""
    lengths = []
    for draw in draws:
        lengths.append(min(total, int(50 * (16384 / 50) ** draw)))
        total -= lengths[-1]
        if total < 50:
            break
    return lengths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=300, max_size=300), st.sampled_from([2, 4, 8, 16]), st.sampled_from([1, 4]))
def test_attention_work_is_balanced(draws: list[float], ring: int, ulysses: int) -> None:
    """Packs of 32k rows: the busiest rank's attention work is at most 2 % above the mean.

    It holds wherever rounding to rows is small: a rank's share of each document differs from the mean by a row or two.
    """
    sharding = shard_tokens(realistic(draws, 32768), ring, ulysses, rows=32768)
    assert sharding.balance <= 1.02


@pytest.mark.parametrize(("n", "ring", "least"), [(50, 8, 1.1), (7, 8, 1.1), (1, 4, 4.0)])
def test_balance_that_no_sharding_can_reach(n: int, ring: int, least: float) -> None:
    """One short document on many ranks: whole rows cannot be shared evenly."""
    assert shard_tokens([n], ring, 1).balance >= least
    assert shard_tokens([n], ring, 1).total == -(-n // ring) * ring


def test_work_that_is_the_same_for_every_row_counts_for_balance() -> None:
    """Beside large linears a difference in attention matters less: more documents may stay whole."""
    lengths = [1500, 1300, 1100, 900, 700, 500, 300]
    strict, lenient = shard_tokens(lengths, 4, 1), shard_tokens(lengths, 4, 1, row_pairs=20000)
    assert (lenient.shares_RD > 0).sum() < (strict.shares_RD > 0).sum()
    assert balance(lenient.shares_RD, np.array(lengths), 20000) <= 1.01


def test_bad_input() -> None:
    with pytest.raises(UserError, match="30 rows in a pack of 20"):
        shard_tokens([10, 20], 2, 1, rows=20)
    for bad in ({"ring": 0, "ulysses": 1}, {"ring": 1, "ulysses": 0}, {"ring": 1, "ulysses": 1, "tp": 0}):
        with pytest.raises(ValueError, match="degrees"):
            shard_tokens([4], **bad)
    with pytest.raises(ValueError, match="at least 1"):
        shard_tokens([4, 0], 1, 1)
