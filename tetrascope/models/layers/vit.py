"""The plain vision transformer of CLIP, SigLIP and InternViT: learned absolute positions, pre-norm blocks.

An image (a tile, a view, a frame of a video) is one attention sequence. A class token is a patch row like the others,
the first of its image, whose pixels are not looked at: place 0 of the position table then belongs to it.
Shape suffixes: N rows of all images end to end, E width, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.packed import Packed
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Hugging Face's names of activations."""


@dataclass(frozen=True)
class ViTShape:
    """Shape of a plain vision transformer.

    layers: blocks of the checkpoint. used: how many of them are computed (LLaVA takes features before the last one);
    the others are kept for export. image: side of its square input in pixels. pre_norm: LayerNorm after the position
    table (CLIP). post_norm: the checkpoint holds a final LayerNorm, which is kept for export and never computed.
    layer_scale: a learned factor on each branch (InternViT). patch_bias: of the patch embedding.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    width: int
    layers: int
    heads: int
    mlp: int
    image: int
    patch: int = 14
    channels: int = 3
    used: int = 0
    class_token: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    patch_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    post_norm: bool = False

    def __post_init__(self) -> None:
        if not self.used:
            object.__setattr__(self, "used", self.layers)

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image // self.patch

    @property
    def rows(self) -> int:
        """Encoder rows of an image, the class token included."""
        return self.side**2 + self.class_token

    @property
    def patch_width(self) -> int:
        """Numbers in a patch row, flattened in the order (channel, row, column)."""
        return self.channels * self.patch**2

    @property
    def linears(self) -> int:
        """Multiply-adds a row in the linears of the blocks that are computed."""
        return self.used * (4 * self.width**2 + 2 * self.width * self.mlp)

    @property
    def attention(self) -> int:
        """Multiply-adds a pair of rows in scores and weighted sums."""
        return self.used * 2 * self.width


class Attention(nn.Module):
    """Full attention inside each image."""

    def __init__(self, shape: ViTShape, attend: AttentionFn) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.head_dim = shape.width // shape.heads
        self.attend = attend

    def forward(self, x_NE: Tensor, frames: Packed) -> Tensor:
        q_NHD, k_NHD, v_NHD = self.qkv(x_NE).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        return self.proj(self.attend(q_NHD, k_NHD, v_NHD, frames, causal=False).flatten(1))


class MLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp)
        self.fc2 = nn.Linear(shape.mlp, shape.width)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_NE)))


class LayerScale(nn.Module):
    """A learned factor for each channel (arXiv 2103.17239, eq. 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_NE: Tensor) -> Tensor:
        return x_NE * self.weight


class Block(nn.Module):
    """Pre-norm transformer block (arXiv 2010.11929, eq. 2-3), with LayerScale where the shape has it."""

    def __init__(self, shape: ViTShape, attend: AttentionFn) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.attention = Attention(shape, attend)
        self.scale1 = LayerScale(shape.width) if shape.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.scale2 = LayerScale(shape.width) if shape.layer_scale else nn.Identity()

    def forward(self, x_NE: Tensor, frames: Packed) -> Tensor:
        x_NE = x_NE + self.scale1(self.attention(self.norm1(x_NE), frames))
        return x_NE + self.scale2(self.mlp(self.norm2(x_NE)))


class Patches(nn.Module):
    """Patch embedding plus a place in the position table: rows `[N, P]`, places int64 `[N]` -> `[N, E]`.

    The patch embedding is a matrix product over flattened patches, the same numbers as a convolution whose kernel
    covers each patch once. With a class token, place 0 is its: its learned vector stands in for the embedded pixels.
    """

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.project = nn.Linear(shape.patch_width, shape.width, bias=shape.patch_bias)
        self.places = nn.Embedding(shape.rows, shape.width)
        self.class_token = ClassToken(shape.width) if shape.class_token else None

    def forward(self, patches_NP: Tensor, places_N: Tensor) -> Tensor:
        x_NE = self.project(patches_NP.to(self.project.weight.dtype))
        if self.class_token is not None:
            x_NE = self.class_token(x_NE, places_N)
        return x_NE + self.places(places_N)


class ClassToken(nn.Module):
    """Puts a learned vector where the place is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x_NE: Tensor, places_N: Tensor) -> Tensor:
        return torch.where((places_N == 0)[:, None], self.weight, x_NE)


class VisionTransformer(nn.Module):
    """Patch rows to hidden states `[N, E]` of the last block that is computed; no final norm."""

    def __init__(self, shape: ViTShape, attend: AttentionFn) -> None:
        super().__init__()
        self.patches = Patches(shape)
        self.pre_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps) if shape.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape, attend) for _ in range(shape.layers))
        self.used = shape.used
        if shape.post_norm:
            self.post_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)

    def forward(self, inputs: VisionInputs) -> Tensor:
        x_NE = self.pre_norm(self.patches(inputs.patches_NP, inputs.here_KN[0]))
        for block in list(self.blocks)[: self.used]:
            x_NE = block(x_NE, inputs.frames)
        return x_NE


def vit_sharding(shape: ViTShape, prefix: str = r"vision\.") -> ShardingTable:
    """One rule for every module of a VisionTransformer that has parameters."""
    table: ShardingTable = [
        (prefix + r"patches\.(project|places|class_token)", Replicated()),
        (prefix + r"(pre|post)_norm", Replicated()),
        (prefix + r"blocks\.\d+\.(norm|scale)[12]", Replicated()),
        (prefix + r"blocks\.\d+\.attention\.qkv", Column((shape.width, shape.width, shape.width))),
        (prefix + r"blocks\.\d+\.attention\.proj", Row()),
        (prefix + r"blocks\.\d+\.mlp\.fc1", Column((shape.mlp,))),
        (prefix + r"blocks\.\d+\.mlp\.fc2", Row()),
    ]
    return table


def unused_parameters(shape: ViTShape, prefix: str = r"vision\.") -> tuple[str, ...]:
    """Patterns of the parameters that take no part in computing: blocks after the last used one, the final norm."""
    blocks = [prefix + rf"blocks\.{i}\..*" for i in range(shape.used, shape.layers)]
    return (*blocks, prefix + r"post_norm\..*") if shape.post_norm else tuple(blocks)
