"""How tensor parallelism divides Qwen2-VL."""

from __future__ import annotations

from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable


def sharding(config: Qwen2VLConfig) -> ShardingTable:
    """One rule for every module with parameters of its own.

    The adaptor ends with all features on every rank: which rank needs which is a question of where the image tokens
    lie among the tokens, not of where the patches lay.
    """
    v = config.vision
    return [
        (r"vision\.patch_embed", Replicated()),
        (r"vision\.blocks\.\d+\.norm[12]", Replicated()),
        (r"vision\.blocks\.\d+\.attention\.qkv", Column((v.width, v.width, v.width))),
        (r"vision\.blocks\.\d+\.attention\.proj", Row()),
        (r"vision\.blocks\.\d+\.mlp\.fc1", Column((v.mlp,))),
        (r"vision\.blocks\.\d+\.mlp\.fc2", Row()),
        (r"adaptor\.norm", Replicated()),
        (r"adaptor\.fc1", Column((v.merged_width,))),
        (r"adaptor\.fc2", Row(scatter=False)),
        *decoder_sharding(config.decoder),
    ]
