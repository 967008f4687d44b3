"""Attention plans: which blocks a rank computes and which rows travel.

The oracle is a list of all pairs of rows: every pair that may attend must be computed exactly once, on the rank that
owns the query, and in buffers that are filled as the ring, or the gather, would fill them. A pair that is missed,
computed twice or of the wrong rows changes the list.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.plan import AttentionPlan, Exchange
from tetrascope.parallel.context.attention.ring import travelling
from tetrascope.parallel.context.tokens import TokenSharding, shard_tokens

PACKS = [(16,), (1, 5, 13), (3, 30, 1, 1, 12, 2), (1,), (2, 2, 2), (40, 1, 64)]
CPU = torch.device("cpu")


def pairs(sets: tuple[BlockSet, ...], queries: list[int], keys: list[int]) -> Counter[tuple[int, int]]:
    """Pairs of pack rows that blocks compute, given the pack rows of the two buffers."""
    found: Counter[tuple[int, int]] = Counter()
    for blocks in sets:
        assert all(block.causal == blocks.causal for block in blocks.blocks)
        for rows in (blocks.q.ranges, blocks.k.ranges):  # a set's rows are its own: one merge and one sum for each
            covered = [row for start, count in rows for row in range(start, start + count)]
            assert len(covered) == len(set(covered))
        for block in blocks.blocks:
            for i in range(block.q_rows):
                for j in range(i + 1 if block.causal else block.k_rows):
                    found[queries[block.q_start + i], keys[block.k_start + j]] += 1
    return found


def expected(sharding: TokenSharding, rank: int, causal: bool) -> Counter[tuple[int, int]]:
    """All pairs of rows of one document whose query is this ring rank's. Padding is left out."""
    own = set(ring_rows(sharding, rank))
    found, start = Counter[tuple[int, int]](), 0
    for length in sharding.lengths:
        for query in own & set(range(start, start + length)):
            found.update((query, key) for key in range(start, query + 1 if causal else start + length))
        start += length
    return found


def ring_rows(sharding: TokenSharding, rank: int) -> list[int]:
    rows: list[int] = sharding.order[rank * sharding.ring_rows : (rank + 1) * sharding.ring_rows].tolist()
    return rows


def buffer(sharding: TokenSharding, rank: int) -> list[int]:
    """Pack rows in the buffer that a rank sends, as `travelling` fills it; 0 where it is filled up."""
    numbers = torch.tensor(ring_rows(sharding, rank)).view(-1, 1, 1)
    filled = travelling(numbers, -numbers, AttentionPlan(sharding, rank))
    assert torch.equal(filled[0], -filled[1])
    rows: list[int] = filled[0].flatten().tolist()
    return rows


def only_documents(found: Counter[tuple[int, int]], sharding: TokenSharding) -> Counter[tuple[int, int]]:
    end = sum(sharding.lengths)
    padding = {pair for pair in found if pair[0] >= end or pair[1] >= end}
    assert all(min(pair) >= end for pair in padding)  # padding sees padding only
    return Counter({pair: n for pair, n in found.items() if pair not in padding})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("ring", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", PACKS)
def test_every_pair_once_in_the_ring(lengths: tuple[int, ...], ring: int, chunk: int, causal: bool) -> None:
    sharding = shard_tokens(lengths, ring, 1, chunk=chunk)
    for rank in range(ring):
        steps = AttentionPlan(sharding, rank).ring_steps(causal)
        own = ring_rows(sharding, rank)
        found = pairs(steps[0], own, own)
        for step, sets in enumerate(steps[1:], start=1):
            assert len(sets) <= 1  # one kernel call a step
            found += pairs(sets, own, buffer(sharding, (rank - step) % ring))
        assert only_documents(found, sharding) == expected(sharding, rank, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("ring", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", PACKS)
def test_every_pair_once_over_gathered_keys(lengths: tuple[int, ...], ring: int, chunk: int, causal: bool) -> None:
    sharding = shard_tokens(lengths, ring, 1, chunk=chunk)
    for rank in range(ring):
        plan = AttentionPlan(sharding, rank)
        own, gathered = plan.gathered_steps(causal)
        assert len(gathered) <= (2 if causal else 3)
        order, back = plan.gathered_index(CPU)
        # [R, 2, rows], keys marked by their pack row, values by its negative
        filled = torch.tensor([[b, [-row for row in b]] for b in (buffer(sharding, r) for r in range(ring))])
        keys, values = filled.flatten()[order].view(2, -1).tolist()
        assert keys == [-value for value in values]
        places = torch.full((len(back) + 1,), -1)
        places[: len(order)] = torch.arange(len(order))
        assert torch.equal(back[order], torch.arange(len(order)))  # the way back leads back,
        assert (back == len(order)).sum() == len(back) - len(order)  # and all else is past the end
        queries = ring_rows(sharding, rank)
        found = pairs(own, queries, queries) + pairs(gathered, queries, keys)
        assert only_documents(found, sharding) == expected(sharding, rank, causal)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=6), st.integers(2, 4), st.integers(0, 6), st.booleans())
def test_any_pack(lengths: list[int], ring: int, chunk: int, causal: bool) -> None:
    test_every_pair_once_in_the_ring(tuple(lengths), ring, chunk, causal)
    test_every_pair_once_over_gathered_keys(tuple(lengths), ring, chunk, causal)


def test_a_pack_of_whole_documents_needs_no_ring() -> None:
    sharding = shard_tokens((8, 8, 8, 8), 4, 1, chunk=128)
    for rank in range(4):
        plan = AttentionPlan(sharding, rank)
        assert plan.travel_rows == 0 and not any(plan.cut)
        assert all(not sets for sets in plan.ring_steps(True)[1:]) and plan.gathered_steps(True)[1] == ()


def test_only_documents_that_are_cut_travel() -> None:
    sharding = shard_tokens((64, 8, 8, 8, 8), 4, 1, chunk=4)
    plan = AttentionPlan(sharding, 1)
    assert plan.cut == (True, False, False, False, False, False)
    assert plan.travel_rows == 16 and plan.sharding.ring_rows == 24


def test_what_a_plan_makes_is_made_once() -> None:
    """One plan serves all layers: blocks and index tensors are those of the first call."""
    plan = AttentionPlan(shard_tokens((40, 24), 2, 1, chunk=0), 0)
    assert plan.ring_steps(True) is plan.ring_steps(True) and plan.ring_steps(True) is not plan.ring_steps(False)
    assert plan.gathered_index(CPU)[0] is plan.gathered_index(CPU)[0]
    blocks = plan.ring_steps(True)[1][0]
    assert not blocks.q.contiguous  # the second halves of two documents
    assert blocks.q.index(CPU) is blocks.q.index(CPU) and blocks.cu_seqlens(CPU) is blocks.cu_seqlens(CPU)


@pytest.mark.parametrize("exchange", ["ring", "gathered"])
def test_a_prepared_plan_makes_no_tensor(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a layer asks of it is there, index tensors included: on a GPU each would be a copy."""
    plan = AttentionPlan(shard_tokens((40, 24), 2, 1, chunk=0), 0)
    plan.prepare(CPU, exchange)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("made in a layer")

    for name in ("arange", "tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    x = torch.zeros(plan.sharding.ring_rows, 1, 1)
    travelling(x, x, plan)
    for sets in plan.ring_steps(True) if exchange == "ring" else plan.gathered_steps(True):
        for blocks in sets:
            blocks.q.take(x)
            blocks.cu_seqlens(CPU)
            if not blocks.k.contiguous:
                blocks.k.index(CPU)
    if exchange == "gathered":
        plan.gathered_index(CPU)
