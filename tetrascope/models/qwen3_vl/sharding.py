"""How tensor parallelism divides Qwen3-VL."""

from __future__ import annotations

from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable


def sharding(config: Qwen3VLConfig) -> ShardingTable:
    """One rule for every module with parameters of its own. All mergers end with all features on every rank."""
    v = config.vision
    merger = r"adaptor\.(merger|deepstack\.\d+)"
    return [
        (r"vision\.(patch_embed|positions)", Replicated()),
        (r"vision\.blocks\.\d+\.norm[12]", Replicated()),
        (r"vision\.blocks\.\d+\.attention\.qkv", Column((v.width, v.width, v.width))),
        (r"vision\.blocks\.\d+\.attention\.proj", Row()),
        (r"vision\.blocks\.\d+\.mlp\.fc1", Column((v.mlp,))),
        (r"vision\.blocks\.\d+\.mlp\.fc2", Row()),
        (merger + r"\.norm", Replicated()),
        (merger + r"\.fc1", Column((v.merged_width,))),
        (merger + r"\.fc2", Row(scatter=False)),
        *decoder_sharding(config.decoder),
    ]
