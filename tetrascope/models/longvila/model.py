"""LongVILA: SigLIP, a projector, Qwen2 decoder, over packed sequences (arXiv 2312.07533 §3, 2408.10188 §3).

Shape suffixes: N encoder rows of all frames; E encoder width, H decoder width; F features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.collect import Collect
from tetrascope.models.layers.vlm import VisionLanguageModel
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.longvila.vision import SigLIP


def two_by_two(frames_BSE: Tensor, side: int) -> Tensor:
    """Frames of side x side rows -> one row for every 2 x 2 of them, `[B, S, E]` -> `[F, 4E]`.

    A last row and column of zeros make an odd side even. Four rows lie in a feature one after another: top left, top
    right, bottom left, bottom right. Source: VILA, `flat_square` of base_projector.py.
    """
    grid_BYXE = frames_BSE.unflatten(1, (side, side))
    grid_BYXE = F.pad(grid_BYXE, (0, 0, 0, side % 2, 0, side % 2))
    half = (side + 1) // 2
    blocks = grid_BYXE.unflatten(2, (half, 2)).unflatten(1, (half, 2)).transpose(2, 3)
    return blocks.flatten(3).flatten(0, 2)


class Downsample(nn.Module):
    """mlp_downsample: fc2(gelu(fc1(norm(2 x 2 rows)))), `[N, E]` -> `[F, H]`. Rows after the last whole frame are
    padding; LayerNorm's eps is torch's own."""

    def __init__(self, config: LongVilaConfig) -> None:
        super().__init__()
        hidden, width = config.decoder.hidden, config.projected_width
        self.collect = Collect()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.side = config.vision.side

    def forward(self, x_NE: Tensor) -> Tensor:
        x_NE = self.collect(x_NE)
        frames = len(x_NE) // self.side**2
        frames_BSE = x_NE[: frames * self.side**2].unflatten(0, (frames, self.side**2))
        return self.fc2(F.gelu(self.fc1(self.norm(two_by_two(frames_BSE, self.side)))))


class TwoLayers(nn.Module):
    """mlp2x_gelu: fc2(gelu(fc1(x))), row by row."""

    def __init__(self, config: LongVilaConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.vision.width, config.decoder.hidden)
        self.fc2 = nn.Linear(config.decoder.hidden, config.decoder.hidden)

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NE)))


class OneLayer(nn.Module):
    """linear: fc1(x), row by row, of all rows on every rank."""

    def __init__(self, config: LongVilaConfig) -> None:
        super().__init__()
        self.collect = Collect()
        self.fc1 = nn.Linear(config.vision.width, config.decoder.hidden)

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.fc1(self.collect(x_NE))


def adaptor(config: LongVilaConfig) -> nn.Module:
    """The projector that the configuration names."""
    if config.downsample:
        return Downsample(config)
    return OneLayer(config) if config.projector == "linear" else TwoLayers(config)


class LongVila(VisionLanguageModel):
    """The part of LongVILA that `stage` names."""

    def __init__(self, config: LongVilaConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__(
            config.decoder,
            stage,
            attend,
            vision=lambda: SigLIP(config.vision, attend),
            adaptor=lambda: adaptor(config),
        )
