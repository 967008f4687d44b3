"""How tensor parallelism divides Qwen2.5-VL."""

from __future__ import annotations

from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable


def sharding(config: Qwen2_5VLConfig) -> ShardingTable:
    """One rule for every module with parameters of its own; the adaptor ends with all features on every rank."""
    v = config.vision
    return [
        (r"vision\.patch_embed", Replicated()),
        (r"vision\.blocks\.\d+\.norm[12]", Replicated()),
        (r"vision\.blocks\.\d+\.attention\.qkv", Column((v.width, v.width, v.width))),
        (r"vision\.blocks\.\d+\.attention\.proj", Row()),
        (r"vision\.blocks\.\d+\.mlp\.gate_up", Column((v.intermediate, v.intermediate))),
        (r"vision\.blocks\.\d+\.mlp\.down", Row()),
        (r"adaptor\.norm", Replicated()),
        (r"adaptor\.fc1", Column((v.merged_width,))),
        (r"adaptor\.fc2", Row(scatter=False)),
        *decoder_sharding(config.decoder),
    ]
