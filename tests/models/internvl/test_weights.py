"""Names and shapes of InternVL's tensors in its layouts, and what transformers makes of a written folder.

Oracles: what transformers writes with save_pretrained, the logits it gives after loading what we write, and a literal
list of the names in OpenGVLab's published checkpoints.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tetrascope.engine.logical import Shard
from tetrascope.engine.source import HuggingFaceFolder
from tetrascope.models.family import Stage
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.config import InternVLConfig
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.sharding import Column, Gather, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors, relative
from tetrascope.tools.verify.case import Case, tensor_options
from tetrascope.tools.verify.families.internvl import forward, make_case, oracle, reference_model, tiny_config

PUBLISHED = {
    # InternVL2-2B, one layer of each kind, at the tiny sizes.
    "vision_model.embeddings.class_embedding": (1, 1, 32),
    "vision_model.embeddings.position_embedding": (1, 17, 32),
    "vision_model.embeddings.patch_embedding.weight": (32, 3, 14, 14),
    "vision_model.embeddings.patch_embedding.bias": (32,),
    "vision_model.encoder.layers.1.ls1": (32,),
    "vision_model.encoder.layers.1.ls2": (32,),
    "vision_model.encoder.layers.1.attn.qkv.weight": (96, 32),
    "vision_model.encoder.layers.1.attn.qkv.bias": (96,),
    "vision_model.encoder.layers.1.attn.proj.weight": (32, 32),
    "vision_model.encoder.layers.1.attn.proj.bias": (32,),
    "vision_model.encoder.layers.1.mlp.fc1.weight": (64, 32),
    "vision_model.encoder.layers.1.mlp.fc1.bias": (64,),
    "vision_model.encoder.layers.1.mlp.fc2.weight": (32, 64),
    "vision_model.encoder.layers.1.mlp.fc2.bias": (32,),
    **{f"vision_model.encoder.layers.1.norm{i}.{part}": (32,) for i in (1, 2) for part in ("weight", "bias")},
    "mlp1.0.weight": (128,),
    "mlp1.0.bias": (128,),
    "mlp1.1.weight": (64, 128),
    "mlp1.1.bias": (64,),
    "mlp1.3.weight": (64, 64),
    "mlp1.3.bias": (64,),
    "language_model.model.tok_embeddings.weight": (251, 64),
    "language_model.model.norm.weight": (64,),
    "language_model.output.weight": (251, 64),
    "language_model.model.layers.1.attention.wqkv.weight": (128, 64),
    "language_model.model.layers.1.attention.wo.weight": (64, 64),
    "language_model.model.layers.1.feed_forward.w1.weight": (96, 64),
    "language_model.model.layers.1.feed_forward.w2.weight": (64, 96),
    "language_model.model.layers.1.feed_forward.w3.weight": (96, 64),
    "language_model.model.layers.1.attention_norm.weight": (64,),
    "language_model.model.layers.1.ffn_norm.weight": (64,),
}

CONFIGS = [tiny_config(kind, tied=tied) for kind in ("qwen2", "internlm2", "llama") for tied in (False, True)]


def on_meta(config: InternVLConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


def test_names_and_shapes_of_the_published_checkpoints() -> None:
    found = logical_tensors(FAMILY.weights(tiny_config("internlm2")))
    ones = {re.sub(r"layers\.\d+", "layers.1", name): tensor.shape for name, tensor in found.items()}
    assert ones == PUBLISHED
    assert len(found) == 4 + 2 * 14 + 6 + 3 + 5 * 7


@pytest.mark.parametrize("kind", ["qwen2", "llama", "internlm2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_of_transformers_is_what_it_writes(kind: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(kind, tied=tied)
    model = oracle(config)
    model.save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    tensors = logical_tensors(FAMILY.layouts["hf"].weights(config))
    assert {name: tensor.shape for name, tensor in tensors.items()} == on_disk
    names = {name for name, _ in model.named_parameters()}
    assert logical_tensors(FAMILY.layouts["hf-in-memory"].weights(config)).keys() == names


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_is_a_stack_of_checkpoint_tensors(config: InternVLConfig) -> None:
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes
    assert next(iter(FAMILY.layouts.values())).weights(config) == FAMILY.weights(config)


def write(folder: Path, layout: str, case: Case) -> None:
    """A checkpoint in that layout, put together from the canonical tensors."""
    chosen = FAMILY.layouts[layout]
    table = chosen.weights(case.config)
    written: dict[str, Tensor] = {}
    for name, pieces in relative(table, FAMILY.weights(case.config)).items():
        parts = [case.weights[p.tensor.name].reshape(p.tensor.matrix)[p.start : p.start + p.rows] for p in pieces]
        written[name] = torch.cat(parts).reshape(logical_tensors(table)[name].shape)
    save_file(written, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for path, content in chosen.configs(case.config, "float32").items():
        (folder / path).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_what_is_written_in_a_layout_is_read_back(layout: str, kind: str, tmp_path: Path) -> None:
    case = make_case(kind)
    write(tmp_path, layout, case)
    source = HuggingFaceFolder(tmp_path, FAMILY.layouts, case.config)
    assert source.layout == layout
    source.check()
    for name, tensor in logical_tensors(FAMILY.weights(case.config)).items():
        whole = Shard(name, tensor.matrix, (0,) * len(tensor.matrix), torch.empty(tensor.matrix))
        assert torch.equal(source(whole), case.weights[name].reshape(tensor.matrix)), name


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
@pytest.mark.parametrize("layout", ["hf", "hf-in-memory"])
def test_transformers_loads_what_is_written(layout: str, kind: str, tmp_path: Path) -> None:
    case = make_case(kind)
    write(tmp_path, layout, case)
    model_class = type(oracle(case.config))
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected: Any = reference_model(case)
    with torch.no_grad():
        for document in (case.documents[0], case.documents[6]):
            ours, theirs = forward(loaded.eval(), document), forward(expected.eval(), document)
            # With Qwen2 both are transformers, and equal in every bit; InternLM2's oracle is the reference.
            assert torch.equal(ours, theirs) if kind == "qwen2" else torch.allclose(ours, theirs, atol=4e-5)


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_a_tied_head_may_be_there(kind: str) -> None:
    for name, layout in FAMILY.layouts.items():
        tied = tiny_config(kind, tied=True)
        heads = list(layout.copies(tied))
        own = logical_tensors(layout.weights(tiny_config(kind)))
        assert len(heads) == 1 and heads[0] in own, name
        assert set(layout.copies(tied).values()) <= logical_tensors(layout.weights(tied)).keys()
        assert not layout.copies(tiny_config(kind))


def test_initial_values() -> None:
    config = tiny_config("internlm2")
    for name, shape, expected in (
        ("language_model.output.weight", (251, 64), ("normal", 0.02)),
        ("language_model.model.norm.weight", (64,), ("constant", 1.0)),
        ("vision_model.embeddings.class_embedding", (32,), ("normal", 0.02)),
        ("vision_model.embeddings.position_embedding", (17, 32), ("normal", 0.02)),
        ("vision_model.encoder.layers.0.ls2", (32,), ("constant", 0.1)),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (96,), ("constant", 0.0)),
        ("mlp1.0.weight", (128,), ("constant", 1.0)),
    ):
        assert logical_tensors(FAMILY.weights(config))[name].matrix == shape
        assert FAMILY.initial(config, name, shape) == expected


def test_the_oracle_decays_what_the_engine_decays() -> None:
    # The class token is a vector here and [1, 1, E] in the oracle, whose own dimensions would have it decay.
    case = make_case("qwen2")
    for weights in (None, FAMILY.layouts["hf"].weights(case.config)):
        options = tensor_options(case, weights)
        vectors = {name for name, own in options.items() if own.weight_decay == 0}
        (token,) = (name for name in options if "cls_token" in name or "class_embedding" in name)
        (places,) = (name for name in options if "position_embedding" in name)
        assert token in vectors and places not in vectors
        assert all(own.weight_decay == case.optimizer.weight_decay for n, own in options.items() if n not in vectors)


@pytest.mark.parametrize("config", [*CONFIGS, FAMILY.presets["internvl2-2b"]()])
def test_one_sharding_rule_for_every_module_with_parameters(config: InternVLConfig) -> None:
    table = FAMILY.sharding(config)
    owners = {n: m for n, m in on_meta(config).named_modules() if m._parameters or n == "adaptor.collect"}
    rules = {name: rule_for(table, name) for name in owners}
    for name, rule in rules.items():
        module = owners[name]
        # What divides: linears by their rows or columns, the embedding by its rows; nothing else.
        if isinstance(rule, Column):
            assert isinstance(module, nn.Linear) and sum(rule.segments) == module.out_features, name
        elif isinstance(rule, Row):
            assert isinstance(module, nn.Linear), name
        elif isinstance(rule, Vocab):
            assert isinstance(module, nn.Embedding), name
        elif isinstance(rule, Gather):
            assert name == "adaptor.collect"
        else:
            assert not isinstance(module, nn.Linear) or name == "vision.patches.project", name
    unused = [pattern for pattern, _ in table if not any(re.fullmatch(pattern, name) for name in owners)]
    assert unused == [r"vision\.(pre|post)_norm"]  # norms that InternViT lacks
