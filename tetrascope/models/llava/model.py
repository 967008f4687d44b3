"""LLaVA-1.5: CLIP, a two-layer MLP, Llama decoder, over packed sequences (arXiv 2310.03744 §3.2).

Shape suffixes: N encoder rows of all images, the class tokens' among them; E encoder width, H decoder width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.vit import VisionTransformer
from tetrascope.models.layers.vlm import VisionLanguageModel
from tetrascope.models.llava.config import LlavaConfig


class Projector(nn.Module):
    """The adaptor: fc2(gelu(fc1(x))), `[N, E]` -> `[N, H]`.

    It works row by row. The class tokens' rows go through it too and are then left out by `vision_layout`, which costs
    one row in 577 and keeps the rows of an image together however they are divided.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NE)))


class Llava(VisionLanguageModel):
    """The part of LLaVA-1.5 that `stage` names."""

    def __init__(self, config: LlavaConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__(
            config.decoder,
            stage,
            attend,
            vision=lambda: VisionTransformer(config.vision, attend),
            adaptor=lambda: Projector(config.vision.width, config.decoder.hidden),
        )
