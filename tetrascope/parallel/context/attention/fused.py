"""TransformerEngine's fused attention (cuDNN), by the functions under its module.

What it keeps for the backward is the logsumexp, "softmax stats" `[Q, N, 1]` in fp32, and the state of dropout; its own
context parallelism gives back the logsumexp over all keys there, as is done here. Packed stats came with cuDNN 9.6.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.varlen import generation, installed

_MODULE = "transformer_engine.pytorch.cpp_extensions.fused_attn"


class TransformerEngine:
    """TransformerEngine 2 on Hopper and Blackwell data-centre GPUs, with cuDNN 9.6 or newer."""

    def available(self, device: torch.device, dtype: torch.dtype) -> bool:
        if not (9, 0) <= generation(device, dtype) < (12, 0) or not installed(_MODULE):
            return False
        version: tuple[int, ...] = importlib.import_module("transformer_engine.pytorch.utils").get_cudnn_version()
        return version >= (9, 6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        engine = importlib.import_module(_MODULE)
        given = _inputs(engine, q, k, v, blocks) | {"is_training": True}  # else there are no stats
        out, (stats, *_), *_ = _call(engine.fused_attn_fwd, given)
        return out, stats.squeeze(-1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        engine = importlib.import_module(_MODULE)
        given = _inputs(engine, q, k, v, blocks)
        given |= {
            "o": blocks.q.take(out).contiguous(),
            "d_o": blocks.q.take(grad).contiguous(),
            "aux_ctx_tensors": [
                blocks.q.take(lse).contiguous().unsqueeze(-1),
                torch.zeros(2, dtype=torch.int64, device=q.device),  # state of dropout, of which there is none
            ],
        }
        if "dqkv_dtype" in inspect.signature(engine.fused_attn_bwd).parameters:
            constants = importlib.import_module("transformer_engine.pytorch.constants")
            given["dqkv_dtype"] = constants.TE_DType[q.dtype]
        dq, dk, dv, *_ = _call(engine.fused_attn_bwd, given)
        return dq, dk, dv


def _inputs(engine: Any, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> dict[str, Any]:
    """What forward and backward have in common. Layouts are named one by one in newer versions."""
    cu_q, cu_k = blocks.cu_seqlens(q.device)
    return {
        "q": blocks.q.take(q).contiguous(),
        "k": blocks.k.take(k).contiguous(),
        "v": blocks.k.take(v).contiguous(),
        "max_seqlen_q": blocks.longest[0],
        "max_seqlen_kv": blocks.longest[1],
        "cu_seqlens_q": cu_q,
        "cu_seqlens_kv": cu_k,
        "cu_seqlens_q_padded": cu_q,
        "cu_seqlens_kv_padded": cu_k,
        "fake_dtype": q.dtype,
        "fused_attention_backend": engine.FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": q.shape[-1] ** -0.5,
        "attn_mask_type": "padding_causal" if blocks.causal else "padding",
        "qkv_layout": "thd_thd_thd",
        "o_format": "thd",
        "do_format": "thd",
        "dqkv_layout": "thd_thd_thd",
    }


def _call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Calls a function with those of the arguments that this version of it has."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in given.items() if name in known})
