"""Qwen2.5-VL: windowed vision encoder, adaptor, Qwen2 decoder with M-RoPE, over packed sequences."""

from __future__ import annotations

from torch import Tensor

from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.rotary import RotaryTables, multimodal_tables
from tetrascope.models.layers.vlm import VisionLanguageModel
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig
from tetrascope.models.qwen2_5_vl.vision import Merger, VisionEncoder


class Qwen2_5VL(VisionLanguageModel):
    """The part of Qwen2.5-VL that `stage` names."""

    def __init__(self, config: Qwen2_5VLConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__(
            config.decoder,
            stage,
            attend,
            vision=lambda: VisionEncoder(config.vision, attend),
            adaptor=lambda: Merger(config.vision, config.decoder.hidden),
        )
        self.section = config.mrope_section

    def rotary(self, positions_AT: Tensor) -> RotaryTables:
        return multimodal_tables(positions_AT, self.shape.head_dim, self.shape.rope_theta, self.section)
