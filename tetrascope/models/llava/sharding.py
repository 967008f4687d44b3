"""How tensor parallelism divides LLaVA-1.5."""

from __future__ import annotations

from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.layers.vit import vit_sharding
from tetrascope.models.llava.config import LlavaConfig
from tetrascope.models.sharding import Column, Row, ShardingTable


def sharding(config: LlavaConfig) -> ShardingTable:
    """One rule for every module with parameters of its own. The adaptor ends with all features on every rank."""
    return [
        *vit_sharding(config.vision),
        (r"adaptor\.fc1", Column((config.decoder.hidden,))),
        (r"adaptor\.fc2", Row(scatter=False)),
        *decoder_sharding(config.decoder),
    ]
