"""Names and shapes of Qwen3-VL's tensors.

The oracle is transformers: what it writes with save_pretrained, and what it loads from the folders that we write.
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
from torch import nn

from tetrascope.engine.logical import Shard
from tetrascope.engine.source import HuggingFaceFolder
from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.qwen3_vl import FAMILY
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig
from tetrascope.models.sharding import Column, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors
from tetrascope.tools.verify.families.qwen3_vl import forward, make_case, name_on_disk, oracle, tiny_config


def on_meta(config: Qwen3VLConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("original", [True, False])
def test_names_and_shapes_are_those_on_disk(tied: bool, original: bool, tmp_path: Path) -> None:
    # One layout: transformers writes the names that it has in memory.
    config = tiny_config(tied)
    oracle(config).save_pretrained(tmp_path, save_original_format=original)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    # Embedding and norm, 11 a decoder layer, 12 a vision block, patch embedding and table, 6 a merger, perhaps a head.
    assert len(on_disk) == 2 + 5 * 11 + 3 * 12 + 3 + 3 * 6 + (not tied)
    assert {name: tensor.shape for name, tensor in logical_tensors(FAMILY.weights(config)).items()} == on_disk
    assert FAMILY.from_hf(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_a_stack_of_hugging_face_tensors(tied: bool) -> None:
    config = tiny_config(tied)
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_transformers_loads_what_is_written_and_so_do_we(layout: str, tied: bool, tmp_path: Path) -> None:
    case = make_case(tied=tied)
    chosen = FAMILY.layouts[layout]
    save_file(case.weights, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    for path, content in chosen.configs(case.config, "float32").items():
        (tmp_path / path).write_text(json.dumps(content))
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


def test_a_tied_head_may_be_there() -> None:
    (layout,) = FAMILY.layouts.values()
    for config, allowed in ((tiny_config(tied=True), ["lm_head.weight"]), (tiny_config(), [])):
        assert list(layout.copies(config)) == allowed
        assert set(layout.copies(config).values()) <= logical_tensors(layout.weights(config)).keys()


def test_initial_values() -> None:
    config = tiny_config()
    assert FAMILY.initial(config, "model.visual.pos_embed.weight", (25, 32)) == ("normal", 0.02)
    assert FAMILY.initial(config, "model.visual.deepstack_merger_list.0.norm.weight", (128,)) == ("constant", 1.0)
    assert FAMILY.initial(config, "model.visual.patch_embed.proj.bias", (32,)) == ("constant", 0.0)


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(tied=True), FAMILY.presets["2b"]()], ids=["tiny", "tied", "2b"]
)
def test_one_sharding_rule_for_every_module_with_parameters(config: Qwen3VLConfig) -> None:
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
