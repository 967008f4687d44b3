"""Names of Qwen3-VL's parameters in checkpoints: published, on disk and in memory alike."""

from __future__ import annotations

from collections.abc import Mapping

from tetrascope.models.layers.decoder_tables import decoder_weights
from tetrascope.models.layers.parts import language_part, own_part, own_settings
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig, from_hf, to_hf
from tetrascope.models.weights import CheckpointLayout, Piece, WeightMap, single_config, whole


def weights(config: Qwen3VLConfig) -> WeightMap:
    """The published layout. Tied embeddings: the head is the embedding."""
    d, v = config.decoder, config.vision
    table: dict[str, tuple[Piece, ...]] = {}

    def linear(ours: str, theirs: str, rows: int, columns: int) -> None:
        table[f"{ours}.weight"] = (whole(f"{theirs}.weight", (rows, columns)),)
        table[f"{ours}.bias"] = (whole(f"{theirs}.bias", (rows,)),)

    def layer_norm(ours: str, theirs: str, width: int) -> None:
        for part in ("weight", "bias"):
            table[f"{ours}.{part}"] = (whole(f"{theirs}.{part}", (width,)),)

    def merger(ours: str, theirs: str, norm_width: int) -> None:
        layer_norm(f"{ours}.norm", f"{theirs}.norm", norm_width)
        linear(f"{ours}.fc1", f"{theirs}.linear_fc1", v.merged_width, v.merged_width)
        linear(f"{ours}.fc2", f"{theirs}.linear_fc2", d.hidden, v.merged_width)

    kernel = (v.width, v.channels, v.temporal_patch, v.patch, v.patch)
    table["vision.patch_embed.weight"] = (whole("model.visual.patch_embed.proj.weight", kernel),)
    table["vision.patch_embed.bias"] = (whole("model.visual.patch_embed.proj.bias", (v.width,)),)
    table["vision.positions.weight"] = (whole("model.visual.pos_embed.weight", (v.table_side**2, v.width)),)
    for i in range(v.layers):
        ours, theirs = f"vision.blocks.{i}", f"model.visual.blocks.{i}"
        layer_norm(f"{ours}.norm1", f"{theirs}.norm1", v.width)
        layer_norm(f"{ours}.norm2", f"{theirs}.norm2", v.width)
        linear(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", 3 * v.width, v.width)
        linear(f"{ours}.attention.proj", f"{theirs}.attn.proj", v.width, v.width)
        linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.linear_fc1", v.mlp, v.width)
        linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.linear_fc2", v.width, v.mlp)
    merger("adaptor.merger", "model.visual.merger", v.width)
    for i in range(len(v.deepstack)):
        merger(f"adaptor.deepstack.{i}", f"model.visual.deepstack_merger_list.{i}", v.merged_width)
    return {**table, **decoder_weights(d, prefix="model.language_model.")}


def _tied_head(config: Qwen3VLConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"} if config.decoder.tied_embeddings else {}


LAYOUTS = {"hub": CheckpointLayout(weights=weights, configs=single_config(to_hf), copies=_tied_head)}

PARTS = {
    "language": language_part("qwen3"),
    "vision": own_part(LAYOUTS, r"vision\..*", own_settings(from_hf, "vision")),
    "adaptor": own_part(LAYOUTS, r"adaptor\..*"),
}
