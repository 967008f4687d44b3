"""Gathered keys and values: all-gather once, compute at one go; for packs of many short documents.

The exchange of llama3 (arXiv 2407.21783, §3.3.2) with the zigzag's balance. A rank computes its rows with each other
first, as in the ring, then with the keys before, between and after its two chunks of each document: three kernel calls
at most, whatever the degree, and no key is duplicated. The gradients of the keys go back by a reduce-scatter in fp32.

Bytes that a rank sends per layer (T, K, D, e as in ring.py): forward (ring - 1)·2·T·K·D·e, backward as much again and
(ring - 1)·2·T·K·D·4.
"""

from __future__ import annotations

from torch import Tensor

from tetrascope.parallel.context.attention.gradients import Backward, accumulator
from tetrascope.parallel.context.attention.kernels import BlockKernel
from tetrascope.parallel.context.attention.links import Arrival, Links
from tetrascope.parallel.context.attention.merge import Merged
from tetrascope.parallel.context.attention.plan import AttentionPlan
from tetrascope.parallel.context.attention.ring import back_home, travelling


def _gather(k: Tensor, v: Tensor, plan: AttentionPlan, links: Links) -> Arrival:
    """Keys and values `[2, rows, K, D]` of all documents that are cut, end to end."""
    arrival = links.gather(travelling(k, v, plan), "gathered kv")
    order, _ = plan.gathered_index(k.device)
    return lambda: arrival().flatten(0, 2).index_select(0, order).unflatten(0, (2, -1))


def _give_back(rows: Tensor, plan: AttentionPlan, links: Links) -> Tensor:
    """Gradients of all those rows and a row of zeros, `[2·rows + 1, K, D]`, from every rank -> their sum for the rows
    that this rank sent."""
    _, back = plan.gathered_index(rows.device)
    return links.reduce_scatter(rows.index_select(0, back).unflatten(0, (links.size, 2, -1)), "gathered dkv")


def gathered_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, causal: bool, links: Links, kernel: BlockKernel
) -> tuple[Tensor, Tensor]:
    """As `ring_forward`."""
    merged, (own, cut) = Merged(q), plan.gathered_steps(causal)
    arrival = _gather(k, v, plan, links) if plan.travel_rows else None
    for blocks in own:
        merged.add(blocks.q, *kernel.forward(q, k, v, blocks))
    if arrival:
        everything = arrival()
        for blocks in cut:
            merged.add(blocks.q, *kernel.forward(q, everything[0], everything[1], blocks))
    return merged.result()


def gathered_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    causal: bool,
    links: Links,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor]:
    """As `ring_backward`."""
    own, cut = plan.gathered_steps(causal)
    arrival = _gather(k, v, plan, links) if plan.travel_rows else None
    backward = Backward(kernel, grad, q, out, lse)
    dkv = backward.compute(k, v, own)(accumulator(k, 2))
    if arrival:
        everything = arrival()
        rows = accumulator(everything[0, 0], everything.shape[0] * everything.shape[1] + 1)
        backward.compute(everything[0], everything[1], cut)(rows[:-1].unflatten(0, (2, -1)))
        back_home(dkv, _give_back(rows, plan, links), plan)
    return backward.dq, dkv
