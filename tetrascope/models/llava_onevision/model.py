"""LLaVA-OneVision: SigLIP, a two-layer adaptor with a newline vector, Qwen2 decoder, over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.vit import VisionTransformer
from tetrascope.models.layers.vlm import VisionLanguageModel
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig


class Adaptor(nn.Module):
    """fc2(gelu(fc1(x))): encoder rows `[N, E]` -> features `[N, H]`; and `newline` `[H]`, which ends rows of an image.

    Source: arXiv 2408.03326 §3.1; LLaVA-NeXT `llava/model/llava_arch.py`, `image_newline`.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.newline = nn.Parameter(torch.zeros(hidden))

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NE)))


class LlavaOneVision(VisionLanguageModel):
    """The part of LLaVA-OneVision that `stage` names."""

    def __init__(self, config: LlavaOneVisionConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__(
            config.decoder,
            stage,
            attend,
            vision=lambda: VisionTransformer(config.vision, attend),
            adaptor=lambda: Adaptor(config.vision.width, config.decoder.hidden),
        )
