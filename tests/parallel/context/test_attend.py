"""Context-parallel attention against the formula on the whole pack, in fp64: output and the gradients of q, k and v.

The oracle knows neither blocks nor ranks. A block that is missed or computed with the wrong rows, a replica's gradient
that is lost, keys that are stale in the backward, or a logsumexp that is a block's own are off by the size of the
values; what is left is rounding.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import pytest
import torch
from torch import Tensor

from tests.parallel.context.attention_jobs import (
    Case,
    assemble,
    formula,
    local_pack,
    quiet_layer,
    recompute,
    run_cases,
)
from tetrascope.parallel.context.attention.plan import AttentionPlan
from tetrascope.tools.verify.pool import WorkerPool

LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]  # ring, ulysses
PACKS = [(16,), (3, 30, 1, 1, 12, 2)]
HEADS = [
    (8, 8),
    (8, 2),
    (8, 1),
    (12, 3),
]  # fewer key heads than Ulysses ranks; one; a number that 2 and 4 do not divide


def worst(case: Case, got: list[Tensor]) -> float:
    """Largest error, of a tensor's largest element where that is above 1."""
    pairs = zip(got, formula(case), strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


def errors(pool: WorkerPool, cases: list[Case]) -> list[float]:
    """`worst` of each case; all cases have one layout."""
    ranks = pool.run(run_cases, cases, world=cases[0].ring * cases[0].ulysses)
    return [worst(case, assemble(case, [rank[i][0] for rank in ranks])) for i, case in enumerate(cases)]


@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_parity_in_fp64(pool: WorkerPool, ring: int, ulysses: int) -> None:
    """Bound: fp64 rounding (2e-16) of sums of up to 30 terms."""
    cases = [
        Case(ring, ulysses, lengths, heads, causal, exchange)
        for lengths in PACKS
        for heads in HEADS
        for causal in (True, False)
        for exchange in (("ring", "gathered") if ring > 1 else ("ring",))
    ]
    found = dict(zip(cases, errors(pool, cases), strict=True))
    assert {case: error for case, error in found.items() if not error <= 1e-14} == {}


@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_parity_in_fp32(pool: WorkerPool, ring: int, ulysses: int) -> None:
    """Bound: fp32 rounding (6e-8) of such sums, through softmax, whose gradient's terms cancel; largest seen 7e-7.

    Sharp scores (8 times the usual) put nearly all weight on a few keys, so that logsumexps of blocks are far apart;
    rounding of scores of size 30 is then 2e-6 of a weight.
    """
    base = Case(ring, ulysses, (3, 30, 1, 1, 12, 2), (8, 2), dtype=torch.float32)
    cases = [
        base,
        replace(base, causal=False),
        replace(base, exchange="gathered"),
        replace(base, kernel="reference"),
        replace(base, chunk=2),  # short documents stay whole on a rank and do not travel
        replace(base, chunk=2, exchange="gathered"),
        replace(base, scale=8.0),
        replace(base, scale=8.0, exchange="gathered"),
    ]
    found = dict(zip(cases, errors(pool, cases), strict=True))
    assert {case: error for case, error in found.items() if not error <= (2e-6 if case.scale == 1 else 2e-5)} == {}


def test_half_precision_is_as_good_as_one_rank(pool: WorkerPool) -> None:
    """Partial results and gradients are summed in fp32, so that a ring of 4 may add the rounding of the blocks' own
    results (2⁻⁹ of them), but no more: 2.5 times the error of one rank, which rounds the same results once."""
    case = Case(1, 1, (64, 9, 30), (4, 2), dtype=torch.bfloat16, width=16)
    one, ring = errors(pool, [case])[0], errors(pool, [replace(case, ring=4)])[0]
    gathered = errors(pool, [replace(case, ring=4, exchange="gathered")])[0]
    assert ring <= 2.5 * one + 2e-3 and gathered <= 2.5 * one + 2e-3


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 4), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_follow_the_formulas(
    pool: WorkerPool, ring: int, ulysses: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Exactly, on every rank, forward and backward together. L: rows, P: ranks of an axis, d and d_kv: elements of a
    row of queries and of keys.

    Ulysses: (P-1)/P · L/P · (2d + 2d_kv) each way. Ring: (P-1) · L/P · 2d_kv each way and, in fp32, (P-1) · L/P · 2d_kv
    for the gradients of keys and values. Gathered: the same, as all-gathers and a reduce-scatter. Published figures
    have P hops for the ring's gradients; here a rank's own share stays at home, which saves one of them.
    """
    base = Case(ring, ulysses, (64, 32), heads, dtype=dtype)
    width, size = base.width, dtype.itemsize
    kv_heads = lcm(heads[1], ulysses)  # as they travel
    rows = 96 // ring // ulysses  # of a rank
    d, d_kv = heads[0] * width, kv_heads * width
    all_to_all = (ulysses - 1) * rows * (2 * d + 2 * d_kv) * size // ulysses
    # in the ring, a rank has the rows of its Ulysses group and its share of the heads
    kv = (ring - 1) * rows * ulysses * 2 * d_kv // ulysses
    for exchange in ("ring", "gathered"):
        case = replace(base, exchange=exchange)
        for [(_, sent)] in pool.run(run_cases, [case], world=ring * ulysses):
            expected = {"ulysses": 2 * all_to_all, f"{exchange} kv": 2 * kv * size, f"{exchange} dkv": kv * 4}
            assert +sent == {kind: count for kind, count in expected.items() if count}


def test_whole_documents_send_nothing(pool: WorkerPool) -> None:
    case = Case(4, 1, (8, 8, 8, 8), (2, 1), chunk=128)
    ranks = pool.run(run_cases, [case], world=4)
    assert worst(case, assemble(case, [rank[0][0] for rank in ranks])) <= 1e-14
    assert [rank[0][1] for rank in ranks] == [{}] * 4


@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("exchange", ["ring", "gathered"])
def test_recompute_keeps_results(pool: WorkerPool, ring: int, ulysses: int, exchange: str) -> None:
    """Two attentions inside one checkpoint: bit-equal gradients, each kernel called half as often, no second ring.

    Bytes: of the ring, three transfers instead of four for keys and values (forward, recomputation, backward). Ulysses
    is run again: keys and queries are computed again from the checkpoint's inputs.
    """
    case = Case(ring, ulysses, (3, 30, 1, 12), (8, 2), exchange=exchange)  # type: ignore[arg-type]
    again = pool.run(recompute, case, False, world=4)
    kept = pool.run(recompute, case, True, world=4)
    for (a, sent_a, calls_a), (b, sent_b, calls_b) in zip(again, kept, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert calls_a == 2 * calls_b > 0
        assert sent_a[f"{exchange} kv"] * 2 == sent_b[f"{exchange} kv"] * 3
        assert sent_a[f"{exchange} dkv"] == sent_b[f"{exchange} dkv"] and sent_a["ulysses"] == sent_b["ulysses"]


@pytest.mark.parametrize("exchange", ["ring", "gathered"])
def test_layers_read_nothing_back(pool: WorkerPool, exchange: str) -> None:
    """No layer asks the device for a number or a shape, waits at a barrier, or makes an index: with a plan that was
    prepared, forward and backward call none of the operations that would."""
    case = Case(2, 2, (3, 30, 1, 12), (8, 2), exchange=exchange)  # type: ignore[arg-type]
    for operations in pool.run(quiet_layer, case, world=4):
        assert "bmm" not in operations and "_scaled_dot_product_flash_attention_for_cpu" in operations  # it did look
        forbidden = ("_local_scalar_dense", "nonzero", "arange", "barrier", "is_nonzero", "equal", "unique", "_to_copy")
        assert [name for name in operations if name.startswith(forbidden)] == []


def test_packs_that_are_not_shared_go_to_the_local_kernel(pool: WorkerPool) -> None:
    assert pool.run(local_pack, world=2) == [True, True]


def test_plan_is_of_the_ring_not_of_the_rank() -> None:
    """Ranks of a Ulysses group have the same blocks."""
    case = Case(2, 4, (16,), (8, 2))
    plan = AttentionPlan(case.sharding, 1)
    assert plan.ring_steps(True)[0][0].q.count == case.sharding.ring_rows == 4 * case.sharding.rank_rows
