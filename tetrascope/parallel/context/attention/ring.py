"""Ring attention: keys and values travel round the ring while each rank computes with those it has.

Liu et al. 2023 (arXiv 2310.01889), with the zigzag order of ring-flash-attention. Transfers are posted one step ahead,
so that they run while a block is computed. In the backward, the sums of dK and dV follow the keys in fp32; what a rank
adds to its own keys stays at home, so that they travel ring - 1 times, not ring.

Bytes that a rank sends per layer, with T rows that travel, K key heads of width D, e bytes an element:
forward (ring - 1)·2·T·K·D·e, backward as much again and (ring - 1)·2·T·K·D·4 for dK and dV.
"""

from __future__ import annotations

from torch import Tensor

from tetrascope.parallel.context.attention.gradients import Backward, accumulator
from tetrascope.parallel.context.attention.kernels import BlockKernel
from tetrascope.parallel.context.attention.links import Links
from tetrascope.parallel.context.attention.merge import Merged
from tetrascope.parallel.context.attention.plan import AttentionPlan


def travelling(k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The rows of k and v `[T, K, D]` that other ranks need, `[2, travel_rows, K, D]`; zeros fill it up."""
    buffer = k.new_empty((2, plan.travel_rows, *k.shape[1:]))
    for into, x in zip(buffer, (k, v), strict=True):
        into[: plan.travel.count] = plan.travel.take(x)
        into[plan.travel.count :] = 0
    return buffer


def back_home(dkv: Tensor, arrived: Tensor, plan: AttentionPlan) -> None:
    """Adds gradients of the rows that travelled `[2, travel_rows, K, D]` to dkv `[2, T, K, D]`."""
    for i in range(2):
        plan.travel.add(dkv[i], arrived[i, : plan.travel.count])


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, causal: bool, links: Links, kernel: BlockKernel
) -> tuple[Tensor, Tensor]:
    """q `[T, N, D]`, k and v `[T, K, D]` of this rank -> its output `[T, N, D]` and logsumexp `[T, N]`."""
    merged, steps = Merged(q), plan.ring_steps(causal)
    last = len(steps) - 1 if plan.travel_rows else 0
    arrival = links.pass_on(travelling(k, v, plan), "ring kv") if last else None
    for blocks in steps[0]:
        merged.add(blocks.q, *kernel.forward(q, k, v, blocks))
    for step in range(1, last + 1):
        kv = arrival()  # type: ignore[misc]  # posted one step ago
        arrival = links.pass_on(kv, "ring kv") if step < last else None
        for blocks in steps[step]:
            merged.add(blocks.q, *kernel.forward(q, kv[0], kv[1], blocks))
    return merged.result()


def ring_backward(
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
    """Gradients of q `[T, N, D]` and of k and v `[2, T, K, D]`, fp32 at least.

    grad `[T, N, D]`: gradient of the output. out, lse: what the forward gave.
    """
    steps = plan.ring_steps(causal)
    last = len(steps) - 1 if plan.travel_rows else 0
    backward = Backward(kernel, grad, q, out, lse)
    arrival = links.pass_on(travelling(k, v, plan), "ring kv") if last else None
    own = backward.compute(k, v, steps[0])(accumulator(k, 2))
    gradient_arrival = None
    for step in range(1, last + 1):
        kv = arrival()  # type: ignore[misc]  # posted one step ago
        arrival = links.pass_on(kv, "ring kv") if step < last else None
        add_to = backward.compute(kv[0], kv[1], steps[step])
        dkv = add_to(gradient_arrival() if gradient_arrival else accumulator(kv))
        gradient_arrival = links.pass_on(dkv, "ring dkv")
    if gradient_arrival:
        back_home(own, gradient_arrival(), plan)
    return backward.dq, own
