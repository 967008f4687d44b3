"""Names of Qwen2-VL's parameters in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from tetrascope.models.layers.decoder_tables import decoder_weights
from tetrascope.models.layers.parts import language_part, own_part, own_settings
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, from_hf, to_hf
from tetrascope.models.weights import CheckpointLayout, Piece, WeightMap, renamed_layout, single_config, whole


def weights(config: Qwen2VLConfig) -> WeightMap:
    """The published layout, which transformers 4 and 5 both read. Tied embeddings: the head is the embedding."""
    d, v = config.decoder, config.vision
    table: dict[str, tuple[Piece, ...]] = {}

    def linear(ours: str, theirs: str, rows: int, columns: int) -> None:
        table[f"{ours}.weight"] = (whole(f"{theirs}.weight", (rows, columns)),)
        table[f"{ours}.bias"] = (whole(f"{theirs}.bias", (rows,)),)

    def layer_norm(ours: str, theirs: str) -> None:
        for part in ("weight", "bias"):
            table[f"{ours}.{part}"] = (whole(f"{theirs}.{part}", (v.width,)),)

    kernel = (v.width, v.channels, v.temporal_patch, v.patch, v.patch)
    table["vision.patch_embed.weight"] = (whole("visual.patch_embed.proj.weight", kernel),)
    for i in range(v.layers):
        ours, theirs = f"vision.blocks.{i}", f"visual.blocks.{i}"
        layer_norm(f"{ours}.norm1", f"{theirs}.norm1")
        layer_norm(f"{ours}.norm2", f"{theirs}.norm2")
        linear(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", 3 * v.width, v.width)
        linear(f"{ours}.attention.proj", f"{theirs}.attn.proj", v.width, v.width)
        linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", v.mlp, v.width)
        linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", v.width, v.mlp)
    layer_norm("adaptor.norm", "visual.merger.ln_q")
    linear("adaptor.fc1", "visual.merger.mlp.0", v.merged_width, v.merged_width)
    linear("adaptor.fc2", "visual.merger.mlp.2", d.hidden, v.merged_width)
    return {**table, **decoder_weights(d)}


def _tied_head(config: Qwen2VLConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.decoder.tied_embeddings else {}


_HUB = CheckpointLayout(weights=weights, configs=single_config(to_hf), copies=_tied_head)

LAYOUTS = {
    "hub": _HUB,
    # What transformers 5 calls the tensors in memory, and writes with save_original_format=False.
    "in-memory": renamed_layout(_HUB, [(r"visual\.", "model.visual."), (r"model\.", "model.language_model.")]),
}

PARTS = {
    "language": language_part("qwen2"),
    "vision": own_part(LAYOUTS, r"vision\..*", own_settings(from_hf, "vision")),
    "adaptor": own_part(LAYOUTS, r"adaptor\..*"),
}
"""Published with the weights of Qwen2 and of an encoder trained elsewhere; here the encoder and the adaptor may come
out of a whole Qwen2-VL."""


def initial(config: Qwen2VLConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """How a tensor starts when training from scratch: matrices normal, norm weights one, biases zero."""
    if len(shape) > 1:
        return "normal", config.initializer_range
    return "constant", 0.0 if name.endswith(".bias") else 1.0
