"""How tensor parallelism divides Qwen2-VL."""

from __future__ import annotations

from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable, Vocab


def sharding(config: Qwen2VLConfig) -> ShardingTable:
    """One rule for every module with parameters of its own.

    The adaptor ends with all features on every rank: which rank needs which is a question of where the image tokens
    lie among the tokens, not of where the patches lay.
    """
    d, v = config.decoder, config.vision
    return [
        (r"vision\.patch_embed", Replicated()),
        (r"vision\.blocks\.\d+\.norm[12]", Replicated()),
        (r"vision\.blocks\.\d+\.attention\.qkv", Column((v.width, v.width, v.width))),
        (r"vision\.blocks\.\d+\.attention\.proj", Row()),
        (r"vision\.blocks\.\d+\.mlp\.fc1", Column((v.mlp,))),
        (r"vision\.blocks\.\d+\.mlp\.fc2", Row()),
        (r"vision\.merger\.norm", Replicated()),
        (r"vision\.merger\.fc1", Column((v.merged_width,))),
        (r"vision\.merger\.fc2", Row(scatter=False)),
        (r"embed", Vocab()),
        (r"layers\.\d+\.(attention|mlp)_norm", Replicated()),
        (r"layers\.\d+\.attention\.qkv", Column(d.qkv_rows)),
        (r"layers\.\d+\.attention\.proj", Row()),
        (r"layers\.\d+\.mlp\.gate_up", Column((d.intermediate, d.intermediate))),
        (r"layers\.\d+\.mlp\.down", Row()),
        (r"norm", Replicated()),
        (r"head", Column((d.vocab,))),
    ]
