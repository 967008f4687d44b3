"""Names of InternVL's parameters in checkpoints: OpenGVLab's, which are the logical ones, and transformers'."""

from __future__ import annotations

from collections.abc import Mapping

from tetrascope.models.internvl.config import InternVLConfig
from tetrascope.models.internvl.hf_config import to_opengvlab, to_transformers
from tetrascope.models.layers.decoder_tables import decoder_weights, grouped_qkv
from tetrascope.models.weights import CheckpointLayout, HFTensor, Piece, WeightMap, renamed_layout, single_config, whole

Table = dict[str, tuple[Piece, ...]]

LAYER_SCALE = 0.1
"""First value of InternViT's factors on its branches (configuration_intern_vit.py, `initializer_factor`)."""


def weights(config: InternVLConfig) -> WeightMap:
    """OpenGVLab's layout. Tied embeddings: the head is the embedding."""
    table = _vision(config, "vision_model.", _OPENGVLAB)
    _adaptor(table, config, "mlp1.0", "mlp1.1", "mlp1.3")
    if config.decoder.kind == "internlm2":
        return {**table, **_internlm2(config, "language_model.")}
    return {**table, **decoder_weights(config.decoder, "language_model.model.", "language_model.lm_head.weight")}


def transformers_weights(config: InternVLConfig) -> WeightMap:
    """The layout that transformers writes. InternLM2 has the names of the Llama that it computes, as in transformers'
    own conversions of InternVL2_5."""
    table = _vision(config, "vision_tower.", _TRANSFORMERS)
    p = "multi_modal_projector"
    _adaptor(table, config, f"{p}.layer_norm", f"{p}.linear_1", f"{p}.linear_2")
    return {**table, **decoder_weights(config.decoder, "language_model.model.", "language_model.lm_head.weight")}


_OPENGVLAB = {
    "class_token": "embeddings.class_embedding",
    "places": "embeddings.position_embedding",
    "project": "embeddings.patch_embedding",
    "block": "encoder.layers.",
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "scale1": "ls1",
    "scale2": "ls2",
}
_TRANSFORMERS = {
    "class_token": "embeddings.cls_token",
    "places": "embeddings.position_embeddings",
    "project": "embeddings.patch_embeddings.projection",
    "block": "encoder.layer.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "qkv": "attention.q_proj attention.k_proj attention.v_proj",
    "proj": "attention.projection_layer",
    "scale1": "lambda_1",
    "scale2": "lambda_2",
}
"""Parts of InternViT by their names in the two layouts; a part that is several tensors has several."""


def _linear(table: Table, ours: str, theirs: str, rows: int, columns: int) -> None:
    """A linear; `theirs`: one name, or several that share its rows."""
    names = theirs.split()
    share = rows // len(names)
    table[f"{ours}.weight"] = tuple(whole(f"{name}.weight", (share, columns)) for name in names)
    table[f"{ours}.bias"] = tuple(whole(f"{name}.bias", (share,)) for name in names)


def _layer_norm(table: Table, ours: str, theirs: str, width: int) -> None:
    for part in ("weight", "bias"):
        table[f"{ours}.{part}"] = (whole(f"{theirs}.{part}", (width,)),)


def _vision(config: InternVLConfig, prefix: str, names: Mapping[str, str]) -> Table:
    v = config.vision
    e, table = v.width, Table()
    project = prefix + names["project"]
    table["vision.patches.project.weight"] = (whole(f"{project}.weight", (e, v.channels, v.patch, v.patch)),)
    table["vision.patches.project.bias"] = (whole(f"{project}.bias", (e,)),)
    table["vision.patches.places.weight"] = (whole(prefix + names["places"], (1, v.rows, e), (v.rows, e)),)
    table["vision.patches.class_token.weight"] = (whole(prefix + names["class_token"], (1, 1, e), (e,)),)
    for i in range(v.layers):
        ours, theirs = f"vision.blocks.{i}", f"{prefix}{names['block']}{i}"
        for norm in ("norm1", "norm2"):
            _layer_norm(table, f"{ours}.{norm}", f"{theirs}.{names[norm]}", e)
        for scale in ("scale1", "scale2"):
            table[f"{ours}.{scale}.weight"] = (whole(f"{theirs}.{names[scale]}", (e,)),)
        qkv = " ".join(f"{theirs}.{name}" for name in names["qkv"].split())
        _linear(table, f"{ours}.attention.qkv", qkv, 3 * e, e)
        _linear(table, f"{ours}.attention.proj", f"{theirs}.{names['proj']}", e, e)
        _linear(table, f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", v.mlp, e)
        _linear(table, f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", e, v.mlp)
    return table


def _adaptor(table: Table, config: InternVLConfig, norm: str, fc1: str, fc2: str) -> None:
    hidden, shuffled = config.decoder.hidden, config.shuffled_width
    _layer_norm(table, "adaptor.norm", norm, shuffled)
    _linear(table, "adaptor.fc1", fc1, hidden, shuffled)
    _linear(table, "adaptor.fc2", fc2, hidden, hidden)


def _internlm2(config: InternVLConfig, prefix: str) -> Table:
    """InternLM2's names: q, k, v fused by key/value head; w1 gates, w3 is multiplied by it, w2 leads back."""
    d, table = config.decoder, Table()
    embedding = whole(f"{prefix}model.tok_embeddings.weight", (d.vocab, d.hidden))
    table["embed.weight"] = (embedding,)
    for i in range(d.layers):
        ours, theirs = f"layers.{i}", f"{prefix}model.layers.{i}"
        table[f"{ours}.attention_norm.weight"] = (whole(f"{theirs}.attention_norm.weight", (d.hidden,)),)
        table[f"{ours}.mlp_norm.weight"] = (whole(f"{theirs}.ffn_norm.weight", (d.hidden,)),)
        fused = HFTensor(f"{theirs}.attention.wqkv.weight", (sum(d.qkv_rows), d.hidden))
        table[f"{ours}.attention.qkv.weight"] = grouped_qkv(fused, d)
        table[f"{ours}.attention.proj.weight"] = (whole(f"{theirs}.attention.wo.weight", (d.hidden, d.qkv_rows[0])),)
        gates = (whole(f"{theirs}.feed_forward.{w}.weight", (d.intermediate, d.hidden)) for w in ("w1", "w3"))
        table[f"{ours}.mlp.gate_up.weight"] = tuple(gates)
        table[f"{ours}.mlp.down.weight"] = (whole(f"{theirs}.feed_forward.w2.weight", (d.hidden, d.intermediate)),)
    table["norm.weight"] = (whole(f"{prefix}model.norm.weight", (d.hidden,)),)
    head = whole(f"{prefix}output.weight", (d.vocab, d.hidden))
    table["head.weight"] = (embedding if d.tied_embeddings else head,)
    return table


def _tied_head(config: InternVLConfig) -> Mapping[str, str]:
    if not config.decoder.tied_embeddings:
        return {}
    if config.decoder.kind == "internlm2":
        return {"language_model.output.weight": "language_model.model.tok_embeddings.weight"}
    return _tied_lm_head(config)


def _tied_lm_head(config: InternVLConfig) -> Mapping[str, str]:
    tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    return tied if config.decoder.tied_embeddings else {}


_HF = CheckpointLayout(transformers_weights, single_config(to_transformers), copies=_tied_lm_head)

LAYOUTS = {
    # Hugging Face's rotary frequencies were saved as buffers by old versions of the remote code.
    "opengvlab": CheckpointLayout(
        weights, single_config(to_opengvlab), ignored=(r".*\.rotary_emb\.inv_freq",), copies=_tied_head
    ),
    "hf": _HF,
    # What transformers 5 calls the tensors in memory, and writes with save_original_format=False.
    "hf-in-memory": renamed_layout(
        _HF,
        [
            (r"language_model\.lm_head\.", "lm_head."),
            (r"language_model\.model\.", "model.language_model."),
            (r"(?=vision_tower\.|multi_modal_projector\.)", "model."),
        ],
    ),
}


def initial(config: InternVLConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """How a tensor starts when training from scratch: matrices and the class token normal, norm weights one, biases
    zero, LayerScale small."""
    if len(shape) > 1 or name.endswith("class_embedding"):
        return "normal", config.initializer_range
    if name.endswith((".ls1", ".ls2")):
        return "constant", LAYER_SCALE
    return "constant", 0.0 if name.endswith(".bias") else 1.0
