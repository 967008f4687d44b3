"""torch's own flash attention for packed sequences on NVIDIA GPUs, and what it takes to choose such kernels.

A packed kernel takes a whole `BlockSet` in one call: its blocks are the sequences, `cu_seqlens` their borders. Heads
that share a key head are its own to handle. logsumexp is `[N, Q]` on its side.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet


def generation(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, such as (9, 0) for Hopper; (0, 0) elsewhere and where dtype is not a half
    precision, which is all that packed kernels take."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.cuda is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def installed(module: str) -> bool:
    """Whether a module is there; the packages around it are imported, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, OSError, RuntimeError):  # a package around it is not there, or was built for another torch
        return False


class TorchVarlen:
    """The flash attention in torch (aten._flash_attention_forward), without its autograd, which hides logsumexp."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        return generation(device, dtype) >= (8, 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        cu_q, cu_k = blocks.cu_seqlens(q.device)
        rows = (blocks.q.take(q), blocks.k.take(k), blocks.k.take(v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *rows, cu_q, cu_k, *blocks.longest, 0.0, blocks.causal, False
        )
        return out, lse.T

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        cu_q, cu_k = blocks.cu_seqlens(q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            blocks.q.take(grad).contiguous(),
            blocks.q.take(q),
            blocks.k.take(k),
            blocks.k.take(v),
            blocks.q.take(out),
            blocks.q.take(lse).T.contiguous(),
            cu_q,
            cu_k,
            *blocks.longest,
            0.0,
            blocks.causal,
            torch.empty(2, dtype=torch.uint64, device=q.device),  # state of dropout, of which there is none
            torch.empty(0, dtype=torch.uint64, device=q.device),
        )
        return dq, dk, dv
