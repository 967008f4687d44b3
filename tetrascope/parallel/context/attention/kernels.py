"""Attention kernels that give the logsumexp with the output and take it back for the gradients, and their registry.

The gradients of one block need the output and logsumexp over *all* keys, not those of the block: with P = exp(s - lse)
the block's part of the whole softmax, dV = Pᵀ·dO and dS = P∘(dO·Vᵀ - rowsum(dO∘O)) (FlashAttention, arXiv 2205.14135,
algorithm 4). So that blocks can be computed on different ranks and at different times, and their gradients added.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.flash import FlashAttention2, FlashAttention3, FlashAttention4
from tetrascope.parallel.context.attention.fused import TransformerEngine
from tetrascope.parallel.context.attention.varlen import TorchVarlen


class BlockKernel(Protocol):
    """Attention of a set of blocks. q `[Tq, N, D]`, k and v `[Tk, K, D]`, N a multiple of K, scale 1/√D."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it can run here."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        """Output `[Q, N, D]` and logsumexp `[Q, N]` (fp32 at least) of the set's rows of q, in the set's order."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the set's rows of q, k and v, in the set's order.

        grad, out `[Tq, N, D]`, lse `[Tq, N]`: gradient, output and logsumexp of the whole result, over all keys.
        """
        ...


class Reference:
    """Written from the formulas, one block at a time, in fp32 at least. Slow; the yardstick."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for i, j in _ranges(blocks):
            scores = _scores(q[i], k[j], blocks.causal)
            lse = scores.logsumexp(-1)
            outs.append(torch.einsum("nqk,knd->qnd", (scores - lse.unsqueeze(-1)).exp(), _repeat(v[j], q)))
            lses.append(lse.T)
        return torch.cat(outs), torch.cat(lses)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        scale, heads = q.shape[-1] ** -0.5, k.shape[1]
        for i, j in _ranges(blocks):
            p = (_scores(q[i], k[j], blocks.causal) - lse[i].T.unsqueeze(-1)).exp()
            grad_out = grad[i].to(p.dtype)
            delta = (grad_out * out[i].to(p.dtype)).sum(-1)
            ds = p * (torch.einsum("qnd,knd->nqk", grad_out, _repeat(v[j], q)) - delta.T.unsqueeze(-1)) * scale
            grads[0].append(torch.einsum("nqk,knd->qnd", ds, _repeat(k[j], q)))
            for into, left, right in ((grads[1], ds, q[i].to(p.dtype)), (grads[2], p, grad_out)):
                into.append(torch.einsum("nqk,qnd->knd", left, right).unflatten(1, (heads, -1)).sum(2))
        return torch.cat(grads[0]), torch.cat(grads[1]), torch.cat(grads[2])


def _ranges(blocks: BlockSet) -> list[tuple[slice, slice]]:
    return [(slice(b.q_start, b.q_start + b.q_rows), slice(b.k_start, b.k_start + b.k_rows)) for b in blocks.blocks]


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values once for every query head, fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`[N, Q, K]`; of a causal square the future is -inf."""
    keys = _repeat(k, q)
    scores = torch.einsum("qnd,knd->nqk", q.to(keys.dtype), keys) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores


class CpuFlash:
    """torch's flash attention for CPUs (the kernel inside scaled_dot_product_attention), one call for each block.

    Query heads that share a key head are a dimension of their own, along which keys have stride 0: nothing is copied.
    """

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for i, j in _ranges(blocks):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _grouped(q[i], k), _grouped(k[j], k, q), _grouped(v[j], k, q), is_causal=blocks.causal
            )
            outs.append(_rows(out))
            lses.append(lse.permute(2, 0, 1).flatten(1))
        return _join(outs), _join(lses)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for i, j in _ranges(blocks):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _grouped(grad[i], k),
                _grouped(q[i], k),
                _grouped(k[j], k, q),
                _grouped(v[j], k, q),
                _grouped(out[i], k),
                lse[i].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0),
                0.0,
                blocks.causal,
            )
            grads[0].append(_rows(found[0]))
            grads[1].append(_sum_of_groups(found[1]))
            grads[2].append(_sum_of_groups(found[2]))
        return _join(grads[0]), _join(grads[1]), _join(grads[2])


def _grouped(x: Tensor, k: Tensor, q: Tensor | None = None) -> Tensor:
    """`[T, N, D]` -> `[K, N/K, T, D]`; keys and values (q given) `[T, K, D]` -> `[K, N/K, T, D]` with stride 0."""
    if q is None:
        return x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    return x.transpose(0, 1).unsqueeze(1).expand(-1, q.shape[1] // k.shape[1], -1, -1)


def _rows(x: Tensor) -> Tensor:
    """`[K, N/K, T, D]` -> `[T, N, D]`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _sum_of_groups(x: Tensor) -> Tensor:
    """`[K, N/K, T, D]`, one gradient for every query head -> `[T, K, D]`, summed in fp32 at least."""
    if x.shape[1] == 1:
        return x[:, 0].transpose(0, 1)
    return x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).transpose(0, 1)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


BLOCK_KERNELS: dict[str, BlockKernel] = {
    "flash-attn-3": FlashAttention3(),
    "flash-attn-4": FlashAttention4(),
    "transformer-engine": TransformerEngine(),
    "flash-attn-2": FlashAttention2(),
    "varlen": TorchVarlen(),
    "cpu-flash": CpuFlash(),
    "reference": Reference(),
}
"""Kernels of context-parallel attention by name, fastest first. A new kernel is one entry here."""


def pick_block_kernel(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, BlockKernel]:
    """The kernel called `name`, or the fastest that can run on `device` with `dtype` for `auto`; its name with it.

    Raises UserError when no kernel has that name, or the one that has it cannot run there.
    """
    if name == "auto":
        name = next(key for key, kernel in BLOCK_KERNELS.items() if kernel.available(device, dtype))
    elif name not in BLOCK_KERNELS or not BLOCK_KERNELS[name].available(device, dtype):
        known = "cannot run" if name in BLOCK_KERNELS else "is unknown"
        able = ", ".join(key for key, kernel in BLOCK_KERNELS.items() if kernel.available(device, dtype))
        raise UserError(
            f"kernels.context: the kernel {name!r} {known} on {device.type} with {str(dtype).removeprefix('torch.')}; "
            f"choose one of auto, {able}, or install what it needs"
        )
    return name, BLOCK_KERNELS[name]
