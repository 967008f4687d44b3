"""What the ranks of `python -m tetrascope.tools.bench.attention` run: our context-parallel attention and torch's.

A side is a function that takes one forward and backward on this rank's rows of one causal document and returns the
output and the gradients of q, k and v. Every side has the same inputs and the same kernel, torch's flash attention for
CPUs, so that what differs is how blocks are chosen, moved and merged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.errors import UserError
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.parallel.context.attention import AttentionPlan, ContextAttention, Exchange, pick_block_kernel
from tetrascope.parallel.context.attention.links import Arrival, Links
from tetrascope.parallel.context.tokens import TokenSharding, shard_tokens
from tetrascope.parallel.mesh import Layout, Mesh

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """One causal document. heads: of queries, of keys. dtype: a name, such as "float32"."""

    rows: int
    heads: tuple[int, int]
    width: int
    dtype: str
    ranks: int

    def inputs(self) -> list[Tensor]:
        """q, k, v and the output's gradient of the whole document."""
        generator = torch.Generator().manual_seed(0)
        q_heads, kv_heads = self.heads
        return [
            torch.randn(self.rows, n, self.width, generator=generator).to(getattr(torch, self.dtype))
            for n in (q_heads, kv_heads, kv_heads, q_heads)
        ]

    def sharding(self, ring: int, ulysses: int) -> TokenSharding:
        return shard_tokens([self.rows], ring, ulysses, chunk=0)


@dataclass
class _Shared:
    context: AttentionPlan


class _StillLinks(Links):
    """Nothing moves: what remains is the time of kernels and merging. The numbers are wrong, the work is not."""

    def pass_on(self, x: Tensor, kind: str) -> Arrival:
        return lambda: x


def our_side(work: Work, ring: int, ulysses: int, exchange: Exchange, still: bool = False) -> Step:
    """A ring of Ulysses groups. still: without communication."""
    mesh = Mesh(Layout(ring=ring, ulysses=ulysses), "cpu")
    dtype = getattr(torch, work.dtype)
    _, kernel = pick_block_kernel("cpu-flash", torch.device("cpu"), dtype)
    attention = ContextAttention(mesh.group("ring"), mesh.group("ulysses"), sdpa_attention, kernel, exchange)
    if still:
        attention.ring = _StillLinks(mesh.group("ring"))
    sharding = work.sharding(ring, ulysses)
    packed = _Shared(AttentionPlan(sharding, mesh.index("ring")))
    return _step(work, sharding, lambda q, k, v: attention(q, k, v, packed, True))


def torch_side(work: Work, rotate: str) -> Step:
    """torch's ring (torch.distributed.tensor.experimental), with its load balancing, which is the zigzag too.

    Its public entry knows CUDA kernels only, so that the functions below it are called with the CPU's. They do not
    share keys among heads: keys are repeated first, as scaled_dot_product_attention does. rotate: "allgather" (its
    default) or "alltoall". Raises UserError where this torch has no such functions.
    """
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention as theirs
    except ImportError as error:
        raise UserError(
            f"bench attention: torch {torch.__version__} keeps its ring attention elsewhere; leave it out with --ours"
        ) from error
    group = Mesh(Layout(ring=dist.get_world_size()), "cpu").group("ring")
    aten = torch.ops.aten

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            theirs.set_rotate_method(rotate)
            op: Any = aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = theirs._templated_ring_attention(group, 2, op, q, k, v, is_causal=True)  # type: ignore[arg-type]
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            q, k, v, out, lse = ctx.saved_tensors
            op: Any = aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = theirs._templated_ring_attention_backward(
                group, 2, op, grad, "grad_out", q, k, v, out, lse, is_causal=True, dropout_p=0.0
            )  # type: ignore[arg-type]
            return found[0], found[1], found[2]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        rows: Tensor = Ring.apply(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)))
        return rows[0].transpose(0, 1)

    return _step(work, work.sharding(dist.get_world_size(), 1), attend)


def _step(work: Work, sharding: TokenSharding, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    rows = torch.from_numpy(sharding.rows_of(dist.get_rank()))
    q, k, v, grad = (x[rows] for x in work.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return step


Side = tuple[str, tuple[Any, ...]]
"""Name of a side, and ("ours", ring, ulysses, exchange, still) or ("torch", rotate): what makes it on a rank."""


def make_side(work: Work, side: Side) -> Step:
    kind, *options = side[1]
    return our_side(work, *options) if kind == "ours" else torch_side(work, *options)


Times = list[list[float]]
"""Seconds of every side in every round."""


def measure_sides(work: Work, sides: list[Side], rounds: int) -> tuple[list[tuple[Tensor, ...]], Times, Times]:
    """Results of every side on this rank, its times until the last rank was through, and this rank's processor time.

    Sides take turns within a round.
    """
    steps = [make_side(work, side) for side in sides]
    results = [step() for step in steps]  # the first call of each is its warm-up
    seconds: Times = [[] for _ in sides]
    busy: Times = [[] for _ in sides]
    for _ in range(rounds):
        for i, step in enumerate(steps):
            dist.barrier()
            began, began_busy = time.perf_counter(), time.process_time()
            step()
            busy[i].append(time.process_time() - began_busy)
            dist.barrier()
            seconds[i].append(time.perf_counter() - began)
    return results, seconds, busy
