"""What the ranks of the context-parallel attention tests do, and the formula that they are held to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tetrascope.parallel.context.attention import AttentionPlan, ContextAttention, Exchange
from tetrascope.parallel.context.attention.kernels import BLOCK_KERNELS
from tetrascope.parallel.context.tokens import TokenSharding, shard_tokens
from tetrascope.parallel.mesh import Layout, Mesh

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output, and gradients of q, k and v."""


@dataclass(frozen=True)
class Case:
    """One attention. chunk: as in `shard_tokens`; 0 cuts every document. heads: of queries, of keys."""

    ring: int
    ulysses: int
    lengths: tuple[int, ...]
    heads: tuple[int, int]
    causal: bool = True
    exchange: Exchange = "ring"
    dtype: torch.dtype = torch.float64
    kernel: str = "cpu-flash"
    chunk: int = 0
    width: int = 8
    scale: float = 1.0

    @property
    def sharding(self) -> TokenSharding:
        return shard_tokens(self.lengths, self.ring, self.ulysses, chunk=self.chunk)


@dataclass
class SharedPack:
    """The part of a pack's description that attention reads."""

    context: AttentionPlan


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the output's gradient of the whole pack; no gradient comes from padding. scale: of the scores."""
    generator = torch.Generator().manual_seed(sum(case.lengths))
    total, (heads, kv_heads) = case.sharding.total, case.heads
    made = [
        torch.randn(total, n, case.width, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    made[0] *= case.scale
    made[3][sum(case.lengths) :] = 0
    return [x.to(case.dtype) for x in made]


def formula(case: Case) -> Gradients:
    """softmax(q·kᵀ/√D)·v of each document, fp64, differentiated by autograd."""
    q, k, v, grad = (x.double() for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outs, start, group = [], 0, case.heads[0] // case.heads[1]
    for length in case.lengths:
        rows = slice(start, start + length)
        keys, values = k[rows].repeat_interleave(group, 1), v[rows].repeat_interleave(group, 1)
        scores = torch.einsum("qnd,knd->nqk", q[rows], keys) / case.width**0.5
        if case.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outs.append(torch.einsum("nqk,knd->qnd", scores.softmax(-1), values))
        start += length
    out = torch.cat(outs)
    gradients = torch.autograd.grad(out, leaves, grad[:start])
    return (out.detach(), *(x[:start] for x in gradients))  # type: ignore[return-value]


def assemble(case: Case, parts: list[Gradients]) -> list[Tensor]:
    """The ranks' rows in the order of the pack, without its padding."""
    inverse = torch.from_numpy(case.sharding.inverse)[: sum(case.lengths)]
    return [torch.cat(of_ranks)[inverse] for of_ranks in zip(*parts, strict=True)]


def run_case(case: Case, mesh: Mesh) -> tuple[Gradients, Counter[str]]:
    """Output and gradients of this rank's rows, and the bytes that it sent for them."""
    attention = ContextAttention(
        mesh.group("ring"), mesh.group("ulysses"), not_shared, BLOCK_KERNELS[case.kernel], case.exchange
    )
    sharding = case.sharding
    rows = torch.from_numpy(sharding.rows_of(mesh.index("ring") * case.ulysses + mesh.index("ulysses")))
    q, k, v, grad = (x[rows] for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, SharedPack(AttentionPlan(sharding, mesh.index("ring"))), case.causal)
    found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    return found, attention.sent  # type: ignore[return-value]


def not_shared(q: Tensor, k: Tensor, v: Tensor, packed: object, causal: bool) -> Tensor:
    """The local kernel of the tests: says that it was called."""
    return q + 1


def run_cases(cases: list[Case]) -> list[tuple[Gradients, Counter[str]]]:
    """All cases have the ring and Ulysses degrees of the first."""
    mesh = Mesh(Layout(ring=cases[0].ring, ulysses=cases[0].ulysses), "cpu")
    return [run_case(case, mesh) for case in cases]


class Operations(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def quiet_layer(case: Case) -> list[str]:
    """The operations of a layer with a plan that was prepared, forward and backward."""
    mesh = Mesh(Layout(ring=case.ring, ulysses=case.ulysses), "cpu")
    attention = ContextAttention(
        mesh.group("ring"), mesh.group("ulysses"), not_shared, BLOCK_KERNELS[case.kernel], case.exchange
    )
    rows = torch.from_numpy(case.sharding.rows_of(dist.get_rank()))
    q, k, v, grad = (x[rows] for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    packed = SharedPack(AttentionPlan(case.sharding, mesh.index("ring")))
    packed.context.prepare(torch.device("cpu"), case.exchange, case.causal)
    with Operations() as seen:
        torch.autograd.grad(attention(*leaves, packed, case.causal), leaves, grad)
    return seen.names


def local_pack() -> bool:
    """Whether a pack without a plan reaches the local kernel as it is."""
    mesh = Mesh(Layout(ring=dist.get_world_size()), "cpu")
    attention = ContextAttention(
        mesh.group("ring"), mesh.group("ulysses"), not_shared, BLOCK_KERNELS["cpu-flash"], "ring"
    )
    q = torch.randn(4, 2, 8)
    return torch.equal(attention(q, q, q, object(), False), q + 1) and not attention.sent


def recompute(case: Case, keep: bool) -> tuple[Gradients, Counter[str], int]:
    """As `run_case`, of two attentions one after another inside a checkpoint; and calls of the forward kernel."""
    mesh = Mesh(Layout(ring=case.ring, ulysses=case.ulysses), "cpu")

    class Counting(type(BLOCK_KERNELS[case.kernel])):  # type: ignore[misc]
        calls = 0

        def forward(self, *args: object) -> tuple[Tensor, Tensor]:
            Counting.calls += 1
            return super().forward(*args)  # type: ignore[no-any-return]

    attention = ContextAttention(mesh.group("ring"), mesh.group("ulysses"), not_shared, Counting(), case.exchange)
    sharding = case.sharding
    rows = torch.from_numpy(sharding.rows_of(dist.get_rank()))
    q, k, v, grad = (x[rows] for x in inputs(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    packed = SharedPack(AttentionPlan(sharding, mesh.index("ring")))

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attention(q.sin(), k.sin(), v.sin(), packed, case.causal)
        return attention(first.cos(), k.cos(), v.cos(), packed, case.causal).tanh()

    if keep:
        run = partial(checkpoint, layers, use_reentrant=False, context_fn=attention.keep_results)
    else:
        run = partial(checkpoint, layers, use_reentrant=False)
    out = run(*leaves)
    assert out is not None
    found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    return found, attention.sent, Counting.calls  # type: ignore[return-value]
