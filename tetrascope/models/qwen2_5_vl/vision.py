"""Qwen2.5-VL's vision encoder and adaptor (arXiv 2502.13923 §2.1; figures from transformers' Qwen2.5-VL).

Shape suffixes: N patches of all frames end to end, window by window, E width, P patch row width, M merged features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.decoder import SwiGLU
from tetrascope.models.layers.norm import RMSNorm
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.rotary import RotaryTables, axial_tables
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLVision
from tetrascope.models.qwen2_vl.vision import NORM_EPS, VisionAttention


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: Qwen2_5VLVision, attend: AttentionFn) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.width, NORM_EPS)
        self.attention = VisionAttention(shape.width, shape.heads, attend)
        self.norm2 = RMSNorm(shape.width, NORM_EPS)
        self.mlp = SwiGLU(shape.width, shape.intermediate, bias=True)

    def forward(self, x_NE: Tensor, packed: Packed, rotary: RotaryTables) -> Tensor:
        x_NE = x_NE + self.attention(self.norm1(x_NE), packed, rotary)
        return x_NE + self.mlp(self.norm2(x_NE))


class Merger(nn.Module):
    """The adaptor: every merge x merge block of patches becomes one feature of the decoder's width."""

    def __init__(self, shape: Qwen2_5VLVision, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.width, NORM_EPS)
        self.fc1 = nn.Linear(shape.merged_width, shape.merged_width)
        self.fc2 = nn.Linear(shape.merged_width, hidden)
        self.merged_width = shape.merged_width

    def forward(self, x_NE: Tensor) -> Tensor:
        blocks = self.norm(x_NE).reshape(-1, self.merged_width)
        return self.fc2(F.gelu(self.fc1(blocks)))


class VisionEncoder(nn.Module):
    """Patch rows to patch features `[N, E]`: most blocks attend inside windows, the others over whole frames.

    Rows come window by window, so frames and windows are both contiguous; which feature is which token of the picture
    is told by the picks (see positions.py). The patch embedding is a matrix product, as in Qwen2-VL.
    """

    def __init__(self, shape: Qwen2_5VLVision, attend: AttentionFn) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(shape.patch_width, shape.width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(shape, attend) for _ in range(shape.layers))
        self.full_attention = frozenset(shape.full_attention)
        self.head_dim = shape.width // shape.heads

    def forward(self, inputs: VisionInputs) -> Tensor:
        if inputs.windows is None:
            raise ValueError("Qwen2.5-VL's encoder needs the lengths of its windows")
        rotary = axial_tables(inputs.positions_KN, self.head_dim)
        x_NE = self.patch_embed(inputs.patches_NP.to(self.patch_embed.weight.dtype))
        for i, block in enumerate(self.blocks):
            x_NE = block(x_NE, inputs.frames if i in self.full_attention else inputs.windows, rotary)
        return x_NE
