"""Qwen3-VL: vision encoder, adaptor with DeepStack, Qwen3 decoder with interleaved M-RoPE, over packed sequences."""

from __future__ import annotations

from torch import Tensor

from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.rotary import RotaryTables, interleaved_tables
from tetrascope.models.layers.vlm import VisionLanguageModel
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig
from tetrascope.models.qwen3_vl.vision import Adaptor, VisionEncoder


class Qwen3VL(VisionLanguageModel):
    """The part of Qwen3-VL that `stage` names."""

    def __init__(self, config: Qwen3VLConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__(
            config.decoder,
            stage,
            attend,
            vision=lambda: VisionEncoder(config.vision, attend),
            adaptor=lambda: Adaptor(config.vision, config.decoder.hidden),
        )
        self.section = config.mrope_section

    def rotary(self, positions_AT: Tensor) -> RotaryTables:
        return interleaved_tables(positions_AT, self.shape.head_dim, self.shape.rope_theta, self.section)


def first_layers(config: Qwen3VLConfig) -> int:
    """The first stage holds at least the layers after which DeepStack adds visual features."""
    return max(1, len(config.vision.deepstack))
