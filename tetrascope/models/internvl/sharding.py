"""How tensor parallelism divides InternVL."""

from __future__ import annotations

from tetrascope.models.internvl.config import InternVLConfig
from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.layers.vit import vit_sharding
from tetrascope.models.sharding import Column, Gather, Replicated, Row, ShardingTable


def sharding(config: InternVLConfig) -> ShardingTable:
    """One rule for every module with parameters of its own.

    A tile's class token makes 2 x 2 blocks straddle any even cut of the rows, so the adaptor gathers them first.
    """
    return [
        *vit_sharding(config.vision),
        (r"adaptor\.collect", Gather()),
        (r"adaptor\.norm", Replicated()),
        (r"adaptor\.fc1", Column((config.decoder.hidden,), gather=False)),
        (r"adaptor\.fc2", Row(scatter=False)),
        *decoder_sharding(config.decoder),
    ]
