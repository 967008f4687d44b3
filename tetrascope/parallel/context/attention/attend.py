"""Attention of a context-parallel rank, as models call it: `attend(q_TND, k_TKD, v_TKD, packed, causal)`.

One autograd function holds all of it: Ulysses inside, the ring (or gathered keys) outside, which is USP (Fang & Zhao
2024, arXiv 2405.07719). Ulysses alone is a ring of one, the ring alone a Ulysses group of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.context.attention.gathered import gathered_backward, gathered_forward
from tetrascope.parallel.context.attention.kernels import BlockKernel
from tetrascope.parallel.context.attention.links import Links
from tetrascope.parallel.context.attention.plan import AttentionPlan, Exchange
from tetrascope.parallel.context.attention.ring import ring_backward, ring_forward
from tetrascope.parallel.context.attention.ulysses import heads_in, heads_in_backward, heads_out, heads_out_backward

_WAYS = {"ring": (ring_forward, ring_backward), "gathered": (gathered_forward, gathered_backward)}

Results: TypeAlias = list[tuple[Tensor, Tensor]]


class ContextAttention:
    """Attention over ring × Ulysses ranks; made once for a mesh, called by all layers.

    ring, ulysses: the process groups. local: the kernel for packs that are not shared, such as a vision encoder's; it
    is called with the arguments as they came. kernel: what computes blocks. exchange: see `Exchange`; the faster one
    depends on links and documents, the result does not.

    A pack is shared where it has an attribute `context`, an `AttentionPlan` for its step. Then q `[T, N, D]`, k and v
    `[T, K, D]` are the rows of this context-parallel rank (of all tensor-parallel ranks together) and the heads of this
    tensor-parallel rank, and so is the output. `check_heads` says which heads can be divided.
    """

    def __init__(
        self,
        ring: dist.ProcessGroup,
        ulysses: dist.ProcessGroup,
        local: Callable[[Tensor, Tensor, Tensor, Any, bool], Tensor],
        kernel: BlockKernel,
        exchange: Exchange = "ring",
    ) -> None:
        self.ring, self.ulysses = Links(ring), Links(ulysses)
        self.kernel = kernel
        self.exchange = exchange
        self._local = local
        self._keep: Results | None = None
        self._replay: Iterator[tuple[Tensor, Tensor]] | None = None

    def __call__(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Any, causal: bool) -> Tensor:
        """Output `[T, N, D]`. Every rank of the ring and the Ulysses group must call it."""
        plan: AttentionPlan | None = getattr(packed, "context", None)
        if plan is None:
            return self._local(q_TND, k_TKD, v_TKD, packed, causal)
        out: Tensor = _Attend.apply(q_TND, k_TKD, v_TKD, self, plan, causal)
        return out

    @property
    def sent(self) -> Counter[str]:
        """Bytes that this rank has sent so far, by kind of transfer."""
        return self.ring.sent + self.ulysses.sent

    def keep_results(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Two contexts, for a forward and for its recomputation, which then takes the ring's result from the forward.

        Give this method to `torch.utils.checkpoint.checkpoint(…, use_reentrant=False, context_fn=…)`: queries, keys and
        values are computed and exchanged again, blocks and the ring's transfers are not. It costs the memory of the
        output and logsumexp of every call.
        """
        results: Results = []
        return _Keeping(self, results, replay=False), _Keeping(self, results, replay=True)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, causal: bool) -> tuple[Tensor, Tensor]:
        if self._replay is not None:
            return next(self._replay)
        result = _WAYS[self.exchange][0](q, k, v, plan, causal, self.ring, self.kernel)
        if self._keep is not None:
            self._keep.append(result)
        return result


class _Keeping(AbstractContextManager[None]):
    """While it is entered, results are put on a list, or taken from it in the order in which they were put there."""

    def __init__(self, attention: ContextAttention, results: Results, replay: bool) -> None:
        self._attention, self._results, self._is_replay = attention, results, replay
        self._before: list[tuple[Results | None, Iterator[tuple[Tensor, Tensor]] | None]] = []

    def __enter__(self) -> None:
        attention = self._attention
        self._before.append((attention._keep, attention._replay))
        if self._is_replay:
            attention._keep, attention._replay = None, iter(self._results)
        else:
            attention._keep, attention._replay = self._results, None

    def __exit__(self, *_: object) -> None:
        self._attention._keep, self._attention._replay = self._before.pop()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: ContextAttention, plan: AttentionPlan, causal: bool
    ) -> Tensor:
        q_in, k_in, v_in = heads_in(q, k, v, attention.ulysses)
        out, lse = attention._forward(q_in, k_in, v_in, plan, causal)
        ctx.save_for_backward(q_in, k_in, v_in, out, lse)
        ctx.attention, ctx.plan, ctx.causal, ctx.kv_heads = attention, plan, causal, k.shape[1]
        return heads_out(out, attention.ulysses).view_as(q)  # not `out` itself: it may be kept for a recomputation

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        attention = ctx.attention
        q, k, v, out, lse = ctx.saved_tensors
        grad_in = heads_out_backward(grad.contiguous(), attention.ulysses)
        backward = _WAYS[attention.exchange][1]
        dq, dkv = backward(grad_in, q, k, v, out, lse, ctx.plan, ctx.causal, attention.ring, attention.kernel)
        dq, dkv = heads_in_backward(dq.to(q.dtype), dkv.to(k.dtype), ctx.kv_heads, attention.ulysses)
        return dq, dkv[0], dkv[1], None, None, None
