"""Attention kernels over packed sequences, and the registry that picks one.

A kernel is a function `attend(q_TND, k_TKD, v_TKD, packed, causal) -> out_TND`: T packed rows, N query heads, K key
and value heads (N a multiple of K), D head width. Queries see the keys of their own document only. Models call the
kernel they were given and know nothing else, so context parallelism and kernel choice stay outside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tetrascope.errors import UserError
from tetrascope.models.layers.packed import Packed


class AttentionFn(Protocol):
    """Attention inside the documents of a packed sequence, softmax scale 1/sqrt(D)."""

    def __call__(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, causal: bool) -> Tensor: ...


def reference_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, causal: bool) -> Tensor:
    """Written from the formula softmax(q·kᵀ/√D)·v, one document at a time, fp32 inside. Slow; the yardstick."""
    groups = q_TND.shape[1] // k_TKD.shape[1]
    outputs = []
    for start, length in zip(packed.offsets, packed.lengths, strict=False):
        rows = slice(start, start + length)
        q = q_TND[rows].float().transpose(0, 1)
        k = k_TKD[rows].float().repeat_interleave(groups, dim=1).transpose(0, 1)
        v = v_TKD[rows].float().repeat_interleave(groups, dim=1).transpose(0, 1)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(q_TND.dtype))
    return torch.cat(outputs) if outputs else torch.zeros_like(q_TND)


class _PermuteRows(torch.autograd.Function):
    """Row permutation whose backward is the inverse gather: `index_select`'s own scatters with atomic adds."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse  # type: ignore[attr-defined]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.inverse), None, None  # type: ignore[attr-defined]


def sdpa_attention(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, causal: bool) -> Tensor:
    """torch's scaled_dot_product_attention, one call for all documents of one length.

    Exact (no padding, no mask), and as few kernel calls as there are distinct lengths. CPU and CUDA.
    """
    groups = q_TND.shape[1] // k_TKD.shape[1]
    permutation = packed.bucket_rows
    if permutation is not None:
        rows, inverse = (index.to(q_TND.device) for index in permutation)
        q_TND, k_TKD, v_TKD = (_PermuteRows.apply(x, rows, inverse) for x in (q_TND, k_TKD, v_TKD))
    outputs, start = [], 0
    for count, length in packed.buckets:
        rows_here = slice(start, start + count * length)
        q, k, v = (x[rows_here].unflatten(0, (count, length)).transpose(1, 2) for x in (q_TND, k_TKD, v_TKD))
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += count * length
    if not outputs:
        return torch.zeros_like(q_TND)
    out_TND = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out_TND if permutation is None else _PermuteRows.apply(out_TND, inverse, rows)


KERNELS: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa_attention, "reference": reference_attention}
"""Attention kernels by name, fastest first. A new kernel is one entry here."""


def pick_attention(name: str) -> tuple[str, AttentionFn]:
    """The kernel called `name`, or the fastest one for `auto`. Returns its name with it, for the start-up log.

    Raises UserError when no kernel has that name.
    """
    if name == "auto":
        name = next(iter(KERNELS))
    if name not in KERNELS:
        raise UserError(f"kernels.attention: no kernel is called {name!r}; choose one of auto, {', '.join(KERNELS)}")
    return name, KERNELS[name]
