"""How tensor parallelism divides LLaVA-OneVision."""

from __future__ import annotations

from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.layers.vit import vit_sharding
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable


def sharding(config: LlavaOneVisionConfig) -> ShardingTable:
    """One rule for every module with parameters of its own. The rule of `adaptor` itself is that of its newline."""
    return [
        *vit_sharding(config.vision),
        (r"adaptor", Replicated()),
        (r"adaptor\.fc1", Column((config.decoder.hidden,))),
        (r"adaptor\.fc2", Row(scatter=False)),
        *decoder_sharding(config.decoder),
    ]
