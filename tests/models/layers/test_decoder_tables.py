"""Sharding table and names of the shared decoder: optional parts, and fused query, key and value.

Names are checked against transformers' state dicts, the fused order against the reshape of InternLM2's attention.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.layers.decoder import DecoderLayer, DecoderShape
from tetrascope.models.layers.decoder_tables import decoder_sharding, decoder_weights, grouped_qkv
from tetrascope.models.sharding import rule_for
from tetrascope.models.weights import HFTensor, check_cover, logical_tensors


def shape_of(**changes: Any) -> DecoderShape:
    fields = {
        "hidden": 32,
        "intermediate": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 50,
        "rms_eps": 1e-6,
        "rope_theta": 1e4,
        "qkv_bias": False,
        "tied_embeddings": False,
    }
    return DecoderShape(**{**fields, **changes})


def transformers_names(kind: str, shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        head_dim=shape.head_dim,
    )
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {}), ("Qwen2", {"qkv_bias": True}), ("Qwen3", {"qk_norm": True, "head_dim": 16})],
)
def test_names_and_shapes_are_those_of_transformers(kind: str, changes: dict[str, Any]) -> None:
    shape = shape_of(**changes)
    table = decoder_weights(shape)
    check_cover(table)
    expected = transformers_names(kind, shape)
    assert {name: tensor.shape for name, tensor in logical_tensors(table).items()} == expected
    for i in range(shape.layers):
        layer = DecoderLayer(shape, sdpa_attention)
        ours = {f"layers.{i}.{name}": tuple(p.shape) for name, p in layer.named_parameters()}
        stacked = {n: (sum(p.rows for p in table[n]), *table[n][0].tensor.matrix[1:]) for n in ours}
        assert stacked == ours
        for name in {name.rpartition(".")[0] for name in ours}:
            rule_for(decoder_sharding(shape), name)


def test_prefix_and_head() -> None:
    names = logical_tensors(decoder_weights(shape_of(), "llm/model.", "llm/lm_head.weight"))
    assert {name.partition("/")[0] for name in names} == {"llm"}
    assert {"llm/model.embed_tokens.weight", "llm/model.layers.1.mlp.up_proj.weight", "llm/lm_head.weight"} <= set(
        names
    )
    tied = decoder_weights(shape_of(tied_embeddings=True), head="output.weight")
    assert "output.weight" not in logical_tensors(tied) and tied["head.weight"] == tied["embed.weight"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_qkv_fused_by_key_value_head(kv_heads: int) -> None:
    shape = shape_of(kv_heads=kv_heads)
    rows = sum(shape.qkv_rows)
    tensor = HFTensor("wqkv", (rows, 3))
    pieces = grouped_qkv(tensor, shape)
    check_cover({"qkv": pieces})
    # InternLM2 views its output as [key/value heads, group + 2, head width]: queries, then key, then value.
    blocks = torch.arange(rows).view(kv_heads, shape.heads // kv_heads + 2, shape.head_dim)
    expected = torch.cat([blocks[:, :-2].flatten(), blocks[:, -2].flatten(), blocks[:, -1].flatten()])
    assert torch.equal(torch.cat([torch.arange(p.start, p.start + p.rows) for p in pieces]), expected)
