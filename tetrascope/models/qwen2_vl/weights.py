"""Hugging Face names of Qwen2-VL's parameters (hub layout, which transformers 4 and 5 both read)."""

from __future__ import annotations

from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.models.weights import HFTensor, WeightMap

EMBEDDING = "model.embed_tokens.weight"


def weights(config: Qwen2VLConfig) -> WeightMap:
    """Parameter name -> Hugging Face tensors stacked in it. Tied embeddings: the head is the embedding."""
    d, v = config.decoder, config.vision
    table: dict[str, tuple[HFTensor, ...]] = {}

    def linear(ours: str, rows: list[tuple[str, int]], columns: int, bias: bool) -> None:
        table[f"{ours}.weight"] = tuple(HFTensor(f"{name}.weight", (n, columns)) for name, n in rows)
        if bias:
            table[f"{ours}.bias"] = tuple(HFTensor(f"{name}.bias", (n,)) for name, n in rows)

    def layer_norm(ours: str, theirs: str) -> None:
        for part in ("weight", "bias"):
            table[f"{ours}.{part}"] = (HFTensor(f"{theirs}.{part}", (v.width,)),)

    kernel = (v.width, v.channels, v.temporal_patch, v.patch, v.patch)
    table["vision.patch_embed.weight"] = (HFTensor("visual.patch_embed.proj.weight", kernel),)
    for i in range(v.layers):
        ours, theirs = f"vision.blocks.{i}", f"visual.blocks.{i}"
        layer_norm(f"{ours}.norm1", f"{theirs}.norm1")
        layer_norm(f"{ours}.norm2", f"{theirs}.norm2")
        linear(f"{ours}.attention.qkv", [(f"{theirs}.attn.qkv", 3 * v.width)], v.width, bias=True)
        linear(f"{ours}.attention.proj", [(f"{theirs}.attn.proj", v.width)], v.width, bias=True)
        linear(f"{ours}.mlp.fc1", [(f"{theirs}.mlp.fc1", v.mlp)], v.width, bias=True)
        linear(f"{ours}.mlp.fc2", [(f"{theirs}.mlp.fc2", v.width)], v.mlp, bias=True)
    layer_norm("vision.merger.norm", "visual.merger.ln_q")
    linear("vision.merger.fc1", [("visual.merger.mlp.0", v.merged_width)], v.merged_width, bias=True)
    linear("vision.merger.fc2", [("visual.merger.mlp.2", d.hidden)], v.merged_width, bias=True)

    embedding = HFTensor(EMBEDDING, (d.vocab, d.hidden))
    table["embed.weight"] = (embedding,)
    q, k, _ = d.qkv_rows
    for i in range(d.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table[f"{ours}.attention_norm.weight"] = (HFTensor(f"{theirs}.input_layernorm.weight", (d.hidden,)),)
        table[f"{ours}.mlp_norm.weight"] = (HFTensor(f"{theirs}.post_attention_layernorm.weight", (d.hidden,)),)
        heads = [(f"{theirs}.self_attn.{part}_proj", n) for part, n in zip("qkv", (q, k, k), strict=True)]
        linear(f"{ours}.attention.qkv", heads, d.hidden, bias=d.qkv_bias)
        linear(f"{ours}.attention.proj", [(f"{theirs}.self_attn.o_proj", d.hidden)], q, bias=False)
        gates = [(f"{theirs}.mlp.{part}_proj", d.intermediate) for part in ("gate", "up")]
        linear(f"{ours}.mlp.gate_up", gates, d.hidden, bias=False)
        linear(f"{ours}.mlp.down", [(f"{theirs}.mlp.down_proj", d.hidden)], d.intermediate, bias=False)
    table["norm.weight"] = (HFTensor("model.norm.weight", (d.hidden,)),)
    head = HFTensor("lm_head.weight", (d.vocab, d.hidden))
    table["head.weight"] = (embedding if d.tied_embeddings else head,)
    return table


def initial(config: Qwen2VLConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """How a tensor starts when training from scratch: matrices normal, norm weights one, biases zero."""
    if len(shape) > 1:
        return "normal", config.initializer_range
    return "constant", 0.0 if name.endswith(".bias") else 1.0
