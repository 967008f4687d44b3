"""Sharding table and checkpoint names of the decoder that the Llama and Qwen families share (layers/decoder.py).

The parameters are called `embed`, `layers.{i}`, `norm` and `head`, at the top of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.sharding import Column, Replicated, Row, ShardingTable, Vocab
from tetrascope.models.weights import HFTensor, Piece, WeightMap, whole


def decoder_sharding(shape: DecoderShape) -> ShardingTable:
    """One rule for every module of the decoder with parameters of its own."""
    head_norms: ShardingTable = [(r"layers\.\d+\.attention\.[qk]_norm", Replicated())] if shape.qk_norm else []
    return [
        (r"embed", Vocab()),
        (r"layers\.\d+\.(attention|mlp)_norm", Replicated()),
        (r"layers\.\d+\.attention\.qkv", Column(shape.qkv_rows)),
        *head_norms,
        (r"layers\.\d+\.attention\.proj", Row()),
        (r"layers\.\d+\.mlp\.gate_up", Column((shape.intermediate, shape.intermediate))),
        (r"layers\.\d+\.mlp\.down", Row()),
        (r"norm", Replicated()),
        (r"head", Column((shape.vocab,))),
    ]


def decoder_weights(shape: DecoderShape, prefix: str = "model.", head: str = "lm_head.weight") -> WeightMap:
    """Names in transformers' Llama, Qwen2 and Qwen3, under `prefix`. Tied embeddings: the head is the embedding."""
    table: dict[str, tuple[Piece, ...]] = {}

    def linear(ours: str, rows: Sequence[tuple[str, int]], columns: int, bias: bool) -> None:
        table[f"{ours}.weight"] = tuple(whole(f"{name}.weight", (n, columns)) for name, n in rows)
        if bias:
            table[f"{ours}.bias"] = tuple(whole(f"{name}.bias", (n,)) for name, n in rows)

    def norm(ours: str, theirs: str, width: int) -> None:
        table[f"{ours}.weight"] = (whole(f"{theirs}.weight", (width,)),)

    embedding = whole(f"{prefix}embed_tokens.weight", (shape.vocab, shape.hidden))
    table["embed.weight"] = (embedding,)
    for i in range(shape.layers):
        ours, theirs = f"layers.{i}", f"{prefix}layers.{i}"
        norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", shape.hidden)
        norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", shape.hidden)
        heads = [(f"{theirs}.self_attn.{part}_proj", n) for part, n in zip("qkv", shape.qkv_rows, strict=True)]
        linear(f"{ours}.attention.qkv", heads, shape.hidden, bias=shape.qkv_bias)
        if shape.qk_norm:
            norm(f"{ours}.attention.q_norm", f"{theirs}.self_attn.q_norm", shape.head_dim)
            norm(f"{ours}.attention.k_norm", f"{theirs}.self_attn.k_norm", shape.head_dim)
        proj = [(f"{theirs}.self_attn.o_proj", shape.hidden)]
        linear(f"{ours}.attention.proj", proj, shape.qkv_rows[0], bias=False)
        gates = [(f"{theirs}.mlp.{part}_proj", shape.intermediate) for part in ("gate", "up")]
        linear(f"{ours}.mlp.gate_up", gates, shape.hidden, bias=False)
        linear(f"{ours}.mlp.down", [(f"{theirs}.mlp.down_proj", shape.hidden)], shape.intermediate, bias=False)
    norm("norm", f"{prefix}norm", shape.hidden)
    table["head.weight"] = (embedding if shape.tied_embeddings else whole(head, (shape.vocab, shape.hidden)),)
    return table


def grouped_qkv(tensor: HFTensor, shape: DecoderShape) -> tuple[Piece, ...]:
    """Our [all queries | all keys | all values] out of a tensor fused by key/value head, as InternLM2's `wqkv`:
    for each key/value head its query heads, then its key, then its value (modeling_internlm2.py, `InternLM2Attention`).
    """
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    block = (group + 2) * d
    return tuple(
        Piece(tensor, head * block + first * d, heads * d)
        for first, heads in ((0, group), (group, 1), (group + 1, 1))
        for head in range(shape.kv_heads)
    )
