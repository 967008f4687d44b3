"""The decoder layer that the Llama and Qwen families share: pre-norm, grouped-query attention, SwiGLU.

Query, key and value are one linear, gate and up another: under tensor parallelism that is one gather of the tokens
each instead of three and two. Shape suffixes: T packed tokens, H hidden width, N query heads, K key/value heads,
D head width, I intermediate width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.norm import RMSNorm
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.rotary import RotaryTables, rotate


@dataclass(frozen=True)
class DecoderShape:
    """Widths of a decoder: everything its layers and its FLOP count depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rms_eps: float
    rope_theta: float
    qkv_bias: bool
    tied_embeddings: bool
    qk_norm: bool = False
    """RMSNorm over the width of each query and key head, before the rotation (Qwen3)."""
    head_dim: int = 0
    """0: hidden / heads."""

    def __post_init__(self) -> None:
        if not self.head_dim and self.heads:
            object.__setattr__(self, "head_dim", self.hidden // self.heads)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value parts of the fused linear."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: DecoderShape, attend: AttentionFn) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.hidden, sum(shape.qkv_rows), bias=shape.qkv_bias)
        self.proj = nn.Linear(shape.qkv_rows[0], shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_eps) if shape.qk_norm else None
        self.head_dim = shape.head_dim
        self.group = shape.heads // shape.kv_heads
        self.attend = attend

    def forward(self, x_TH: Tensor, packed: Packed, rotary: RotaryTables) -> Tensor:
        # The number of heads is read off the projection: under tensor parallelism it holds this rank's heads only.
        heads_TSD = self.qkv(x_TH).unflatten(-1, (-1, self.head_dim))
        kv_heads = heads_TSD.shape[1] // (self.group + 2)
        q_TND, k_TKD, v_TKD = heads_TSD.split((kv_heads * self.group, kv_heads, kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TND, k_TKD = self.q_norm(q_TND), self.k_norm(k_TKD)
        out_TND = self.attend(rotate(q_TND, rotary), rotate(k_TKD, rotary), v_TKD, packed, causal=True)
        return self.proj(out_TND.flatten(1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202, eq. 5)."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=bias)
        self.down = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        gate_TI, up_TI = self.gate_up(x_TH).chunk(2, dim=-1)
        return self.down(F.silu(gate_TI) * up_TI)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: DecoderShape, attend: AttentionFn) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden, shape.rms_eps)
        self.attention = SelfAttention(shape, attend)
        self.mlp_norm = RMSNorm(shape.hidden, shape.rms_eps)
        self.mlp = SwiGLU(shape.hidden, shape.intermediate)

    def forward(self, x_TH: Tensor, packed: Packed, rotary: RotaryTables) -> Tensor:
        x_TH = x_TH + self.attention(self.attention_norm(x_TH), packed, rotary)
        return x_TH + self.mlp(self.mlp_norm(x_TH))
