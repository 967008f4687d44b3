"""Qwen3-VL's vision encoder and adaptor (arXiv 2511.21631 §2; figures from transformers' Qwen3-VL).

Shape suffixes: N patches of all frames end to end, E width, D head width, P patch row width, M merged features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.rotary import RotaryTables, axial_tables
from tetrascope.models.qwen2_vl.vision import VisionAttention
from tetrascope.models.qwen3_vl.config import Qwen3VLVision

NORM_EPS = 1e-6


def table_corners(positions_4N: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Which four entries of a side x side table surround a patch, int64 `[4, N]`, and their weights, fp32 `[4, N]`.

    positions int64 `[4, N]`: row, column, and the rows and columns of the patch's picture. Its corners lie on the
    table's corners (`align_corners`). Taken in fp32 and in this order, as transformers does (`vision_utils.py`,
    `get_vision_interpolation_indices_and_weights`): a weight is an fp32 number up to `side` less its integer part,
    so that exact arithmetic would give others.
    """
    places_2N, sizes_2N = positions_4N[:2], positions_4N[2:]
    at_2N = places_2N.float() * (side - 1) / (sizes_2N - 1).clamp(min=1)
    low_2N = at_2N.floor()
    above_2N = at_2N - low_2N
    # [lower or upper, row or column, N]
    taps = torch.stack((low_2N.long(), low_2N.long() + 1)).clamp(max=side - 1)
    weights = torch.stack((1 - above_2N, 1 - (above_2N - 1).abs()))
    corners = [(i, j) for i in (0, 1) for j in (0, 1)]
    indices_4N = torch.stack([taps[i, 0] * side + taps[j, 1] for i, j in corners])
    weights_4N = torch.stack([weights[i, 0] * weights[j, 1] for i, j in corners])
    return indices_4N, weights_4N


class PositionTable(nn.Module):
    """A learned square table of positions, stretched bilinearly over the patches of each picture."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(side**2, width))
        self.side = side

    def forward(self, positions_4N: Tensor) -> Tensor:
        """fp32 `[N, E]`, for positions as `table_corners` takes them."""
        indices_4N, weights_4N = table_corners(positions_4N, self.side)
        corners = [
            F.embedding(indices_N, self.weight) * weights_N[:, None]
            for indices_N, weights_N in zip(indices_4N, weights_4N, strict=True)
        ]
        return corners[0] + corners[1] + corners[2] + corners[3]


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU (arXiv 1606.08415 §2)."""

    def __init__(self, shape: Qwen3VLVision) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp)
        self.fc2 = nn.Linear(shape.mlp, shape.width)

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NE), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: Qwen3VLVision, attend: AttentionFn) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.attention = VisionAttention(shape.width, shape.heads, attend)
        self.norm2 = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.mlp = VisionMLP(shape)

    def forward(self, x_NE: Tensor, frames: Packed, rotary: RotaryTables) -> Tensor:
        x_NE = x_NE + self.attention(self.norm1(x_NE), frames, rotary)
        return x_NE + self.mlp(self.norm2(x_NE))


class VisionEncoder(nn.Module):
    """Patch rows to patch features `[N, E]`: those of the last block, then those after each DeepStack block.

    The patch embedding is a matrix product over flattened patches: the same numbers as the convolution of the
    original, whose kernel covers each patch once.
    """

    def __init__(self, shape: Qwen3VLVision, attend: AttentionFn) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(shape.patch_width, shape.width)
        self.positions = PositionTable(shape.table_side, shape.width)
        self.blocks = nn.ModuleList(VisionBlock(shape, attend) for _ in range(shape.layers))
        self.deepstack = shape.deepstack
        self.head_dim = shape.width // shape.heads

    def forward(self, inputs: VisionInputs) -> list[Tensor]:
        rotary = axial_tables(inputs.positions_KN[:2], self.head_dim)
        x_NE = self.patch_embed(inputs.patches_NP.to(self.patch_embed.weight.dtype))
        x_NE = x_NE + self.positions(inputs.here_KN).to(x_NE.dtype)
        taken = []
        for i, block in enumerate(self.blocks):
            x_NE = block(x_NE, inputs.frames, rotary)
            if i in self.deepstack:
                taken.append(x_NE)
        return [x_NE, *taken]


class Merger(nn.Module):
    """Every merge x merge block of patches becomes one feature of the decoder's width.

    norm_merged: the norm spans the whole block's channels (DeepStack), not each patch's.
    """

    def __init__(self, shape: Qwen3VLVision, hidden: int, norm_merged: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.merged_width if norm_merged else shape.width, eps=NORM_EPS)
        self.fc1 = nn.Linear(shape.merged_width, shape.merged_width)
        self.fc2 = nn.Linear(shape.merged_width, hidden)
        self.merged_width, self.norm_merged = shape.merged_width, norm_merged

    def forward(self, x_NE: Tensor) -> Tensor:
        if self.norm_merged:
            blocks = self.norm(x_NE.reshape(-1, self.merged_width))
        else:
            blocks = self.norm(x_NE).reshape(-1, self.merged_width)
        return self.fc2(F.gelu(self.fc1(blocks)))


class Adaptor(nn.Module):
    """Features `[M, H]` that become visual tokens, then those that DeepStack adds after decoder layers 0, 1, …
    (arXiv 2406.04334): each kind has a merger of its own."""

    def __init__(self, shape: Qwen3VLVision, hidden: int) -> None:
        super().__init__()
        self.merger = Merger(shape, hidden, norm_merged=False)
        self.deepstack = nn.ModuleList(Merger(shape, hidden, norm_merged=True) for _ in shape.deepstack)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        mergers = (self.merger, *self.deepstack)
        return [merger(x_NE) for merger, x_NE in zip(mergers, features, strict=True)]
