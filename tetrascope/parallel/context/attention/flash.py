"""The flash-attn packages, versions 2, 3 and 4, by the functions under their autograd, which take logsumexp back.

They are imported at the first call. A version is used on the GPUs that it was written for: 2 from Ampere on, 3 on
Hopper, 4 from Hopper on.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.varlen import generation, installed


def _options(blocks: BlockSet, q: Tensor) -> dict[str, Any]:
    """What all three call by the same names."""
    cu_q, cu_k = blocks.cu_seqlens(q.device)
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": blocks.longest[0],
        "max_seqlen_k": blocks.longest[1],
        "softmax_scale": q.shape[-1] ** -0.5,
    }


class FlashAttention2:
    """flash-attn 2 (2.7 or newer): flash_attn.flash_attn_interface."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        # flash-attn 4 lives inside the package of 2, so that the package alone says nothing.
        return generation(device, dtype) >= (8, 0) and installed("flash_attn.flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        out, lse, *_ = interface._flash_attn_varlen_forward(
            blocks.q.take(q),
            blocks.k.take(k),
            blocks.k.take(v),
            **_options(blocks, q),
            dropout_p=0.0,
            causal=blocks.causal,
        )
        return out, lse.T

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        rows = (blocks.q.take(q), blocks.k.take(k), blocks.k.take(v))
        dq, dk, dv = (torch.empty_like(x) for x in rows)
        interface._flash_attn_varlen_backward(
            blocks.q.take(grad).contiguous(),
            *rows,
            blocks.q.take(out),
            blocks.q.take(lse).T.contiguous(),
            dq,
            dk,
            dv,
            **_options(blocks, q),
            dropout_p=0.0,
            causal=blocks.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return dq, dk, dv


class FlashAttention3:
    """flash-attn 3, for Hopper: flash_attn_interface, as its folder `hopper` installs it."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        return generation(device, dtype)[0] == 9 and installed("flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        interface = importlib.import_module("flash_attn_interface")
        out, lse, *_ = interface._flash_attn_forward(
            blocks.q.take(q), blocks.k.take(k), blocks.k.take(v), **_options(blocks, q), causal=blocks.causal
        )
        return out, lse.T

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        interface = importlib.import_module("flash_attn_interface")
        rows = (blocks.q.take(q), blocks.k.take(k), blocks.k.take(v))
        dq, dk, dv = (torch.empty_like(x) for x in rows)
        interface._flash_attn_backward(
            blocks.q.take(grad).contiguous(),
            *rows,
            blocks.q.take(out),
            blocks.q.take(lse).T.contiguous(),
            **_options(blocks, q),
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=blocks.causal,
        )
        return dq, dk, dv


class FlashAttention4:
    """flash-attn 4 (CuTe), for Hopper and Blackwell: flash_attn.cute.interface. Kernels are compiled at first use."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        return generation(device, dtype) >= (9, 0) and installed("flash_attn.cute.interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        interface = importlib.import_module("flash_attn.cute.interface")
        out, lse, *_ = interface._flash_attn_fwd(
            blocks.q.take(q),
            blocks.k.take(k),
            blocks.k.take(v),
            **_options(blocks, q),
            causal=blocks.causal,
            return_lse=True,
        )
        return out, lse.T

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        interface = importlib.import_module("flash_attn.cute.interface")
        dq, dk, dv, *_ = interface._flash_attn_bwd(
            blocks.q.take(q),
            blocks.k.take(k),
            blocks.k.take(v),
            blocks.q.take(out),
            blocks.q.take(grad).contiguous(),
            blocks.q.take(lse).T.contiguous(),
            **_options(blocks, q),
            causal=blocks.causal,
        )
        return dq, dk, dv
