"""SigLIP with the part of its checkpoint that VILA does not use."""

from __future__ import annotations

import torch
from torch import nn

from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.vit import MLP, VisionTransformer, ViTShape
from tetrascope.models.longvila.config import LongVilaVision


class PoolingHead(nn.Module):
    """Parameters of SigLIP's attention pooling (transformers, siglip/modeling_siglip.py). Never computed."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(shape.width))
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = MLP(shape)


class SigLIP(VisionTransformer):
    """The plain vision transformer, and the pooling head where the checkpoint has one."""

    def __init__(self, shape: LongVilaVision, attend: AttentionFn) -> None:
        super().__init__(shape, attend)
        if shape.pooling_head:
            self.pool = PoolingHead(shape)
