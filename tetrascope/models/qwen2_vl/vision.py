"""Qwen2-VL's vision encoder and adaptor (arXiv 2409.12191 §2.1; figures from transformers' Qwen2-VL).

Shape suffixes: N patches of all frames end to end, E width, D head width, P patch row width, M merged features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.rotary import RotaryTables, axial_tables, rotate
from tetrascope.models.qwen2_vl.config import Qwen2VLVision

NORM_EPS = 1e-6


class VisionAttention(nn.Module):
    """Full attention inside each frame."""

    def __init__(self, width: int, heads: int, attend: AttentionFn) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head_dim = width // heads
        self.attend = attend

    def forward(self, x_NE: Tensor, frames: Packed, rotary: RotaryTables) -> Tensor:
        q_NHD, k_NHD, v_NHD = self.qkv(x_NE).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        out_NHD = self.attend(rotate(q_NHD, rotary), rotate(k_NHD, rotary), v_NHD, frames, causal=False)
        return self.proj(out_NHD.flatten(1))


class VisionMLP(nn.Module):
    """fc2(quick_gelu(fc1(x))), quick_gelu(x) = x·σ(1.702 x)."""

    def __init__(self, shape: Qwen2VLVision) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp)
        self.fc2 = nn.Linear(shape.mlp, shape.width)

    def forward(self, x_NE: Tensor) -> Tensor:
        hidden = self.fc1(x_NE)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: Qwen2VLVision, attend: AttentionFn) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.attention = VisionAttention(shape.width, shape.heads, attend)
        self.norm2 = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.mlp = VisionMLP(shape)

    def forward(self, x_NE: Tensor, frames: Packed, rotary: RotaryTables) -> Tensor:
        x_NE = x_NE + self.attention(self.norm1(x_NE), frames, rotary)
        return x_NE + self.mlp(self.norm2(x_NE))


class Merger(nn.Module):
    """The adaptor: every merge x merge block of patches becomes one feature of the decoder's width."""

    def __init__(self, shape: Qwen2VLVision, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.fc1 = nn.Linear(shape.merged_width, shape.merged_width)
        self.fc2 = nn.Linear(shape.merged_width, hidden)
        self.merged_width = shape.merged_width

    def forward(self, x_NE: Tensor) -> Tensor:
        blocks = self.norm(x_NE).reshape(-1, self.merged_width)
        return self.fc2(F.gelu(self.fc1(blocks)))


class VisionEncoder(nn.Module):
    """Patch rows to patch features `[N, E]`.

    The patch embedding is a matrix product over flattened patches: the same numbers as the convolution of the
    original, whose kernel covers each patch once, without a convolution kernel's cost in low precision.
    """

    def __init__(self, shape: Qwen2VLVision, attend: AttentionFn) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(shape.patch_width, shape.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(shape, attend) for _ in range(shape.layers))
        self.head_dim = shape.width // shape.heads

    def forward(self, inputs: VisionInputs) -> Tensor:
        rotary = axial_tables(inputs.positions_KN, self.head_dim)
        x_NE = self.patch_embed(inputs.patches_NP.to(self.patch_embed.weight.dtype))
        for block in self.blocks:
            x_NE = block(x_NE, inputs.frames, rotary)
        return x_NE
