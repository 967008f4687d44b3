"""Names and shapes of Qwen2.5-VL's tensors, in both layouts.

The oracle is transformers: what it writes with save_pretrained, and what it loads from folders in our layouts.
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
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.qwen2_5_vl import FAMILY
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig
from tetrascope.models.sharding import Column, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors, relative
from tetrascope.tools.verify.families.qwen2_5_vl import forward, make_case, name_on_disk, oracle, tiny_config


def on_meta(config: Qwen2_5VLConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_on_disk(tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tied)
    oracle(config).save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    # Embedding and norm, 12 a decoder layer, 12 a vision block, patch embedding, 5 of the merger, a head of its own.
    assert len(on_disk) == 2 + 5 * 12 + 3 * 12 + 1 + 5 + (not tied)
    assert {name: tensor.shape for name, tensor in logical_tensors(FAMILY.weights(config)).items()} == on_disk
    names = {name for name, _ in oracle(config).named_parameters()}
    assert logical_tensors(FAMILY.layouts["in-memory"].weights(config)).keys() == names


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_a_stack_of_hugging_face_tensors(tied: bool) -> None:
    config = tiny_config(tied)
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes


def write(folder: Path, layout: str, config: Qwen2_5VLConfig, tensors: dict[str, Tensor]) -> None:
    """A checkpoint in that layout, put together from the canonical tensors."""
    chosen = FAMILY.layouts[layout]
    written = {}
    for name, pieces in relative(chosen.weights(config), FAMILY.weights(config)).items():
        parts = [tensors[p.tensor.name].reshape(p.tensor.matrix)[p.start : p.start + p.rows] for p in pieces]
        written[name] = torch.cat(parts).reshape(logical_tensors(chosen.weights(config))[name].shape)
    save_file(written, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for path, content in chosen.configs(config, "float32").items():
        (folder / path).write_text(json.dumps(content))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["hub", "in-memory"])
def test_transformers_loads_what_is_written_and_so_do_we(layout: str, tied: bool, tmp_path: Path) -> None:
    case = make_case(tied=tied)
    write(tmp_path, layout, case.config, case.weights)
    source = HuggingFaceFolder(tmp_path, FAMILY.layouts, case.config)
    source.check()
    for name, tensor in logical_tensors(FAMILY.weights(case.config)).items():
        whole = Shard(name, tensor.matrix, (0,) * len(tensor.matrix), torch.empty(tensor.matrix))
        assert torch.equal(source(whole), case.weights[name].reshape(tensor.matrix)), name

    kind = type(oracle(case.config))
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected: Any = oracle(case.config)
    with torch.no_grad():
        for name, param in expected.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
        for document in (case.documents[0], case.documents[6]):
            assert torch.equal(forward(loaded.eval(), document), forward(expected.eval(), document))


@pytest.mark.parametrize("layout", ["hub", "in-memory"])
def test_a_tied_head_may_be_there(layout: str) -> None:
    tied = FAMILY.layouts[layout]
    for config, allowed in ((tiny_config(tied=True), ["lm_head.weight"]), (tiny_config(), [])):
        assert list(tied.copies(config)) == allowed
        assert set(tied.copies(config).values()) <= logical_tensors(tied.weights(config)).keys()


def test_initial_values() -> None:
    config = tiny_config()
    assert FAMILY.initial(config, "lm_head.weight", (251, 64)) == ("normal", 0.02)
    assert FAMILY.initial(config, "visual.merger.ln_q.weight", (32,)) == ("constant", 1.0)
    assert FAMILY.initial(config, "visual.blocks.0.mlp.gate_proj.bias", (44,)) == ("constant", 0.0)


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(tied=True), FAMILY.presets["3b"]()], ids=["tiny", "tied", "3b"]
)
def test_one_sharding_rule_for_every_module_with_parameters(config: Qwen2_5VLConfig) -> None:
    table = FAMILY.sharding(config)
    owners = {name: module for name, module in on_meta(config).named_modules() if module._parameters}
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
        else:
            assert not isinstance(module, nn.Linear) or name == "vision.patch_embed", name
    assert not [pattern for pattern, _ in table if not any(re.fullmatch(pattern, name) for name in owners)]
