"""Names and shapes of LLaVA-OneVision's tensors, in all layouts.

The oracle is transformers: what it writes with save_pretrained, and what it loads from folders in our layouts. For the
original repository's layout it is the renaming of transformers' conversion script, and names of its published files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tetrascope.engine.logical import Shard
from tetrascope.engine.source import HuggingFaceFolder
from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig
from tetrascope.models.sharding import Column, Gather, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors, relative
from tetrascope.tools.verify.families.llava_onevision import forward, make_case, name_on_disk, oracle, tiny_config

LAYOUTS = list(FAMILY.layouts)


def on_meta(config: LlavaOneVisionConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(tied: bool) -> None:
    config = tiny_config(tied)
    theirs = {name: tuple(param.shape) for name, param in oracle(config).named_parameters()}
    ours = logical_tensors(FAMILY.layouts["in-memory"].weights(config))
    assert {name: tensor.shape for name, tensor in ours.items()} == theirs
    hub = logical_tensors(FAMILY.weights(config))
    assert {name: tensor.shape for name, tensor in hub.items()} == {name_on_disk(n): s for n, s in theirs.items()}
    # Embedding, norm; 12 a decoder layer, 16 an encoder block; patches 2, places, final norm 2; adaptor 4, newline.
    assert len(theirs) == 2 + 5 * 12 + 3 * 16 + 5 + 5 + (not tied)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_a_stack_of_hugging_face_tensors(tied: bool) -> None:
    config = tiny_config(tied)
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes


def write(folder: Path, layout: str, config: LlavaOneVisionConfig, tensors: dict[str, Tensor]) -> None:
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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_back_bit_equal(layout: str, tied: bool, tmp_path: Path) -> None:
    case = make_case(tied=tied)
    write(tmp_path, layout, case.config, case.weights)
    config = FAMILY.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == case.config
    source = HuggingFaceFolder(tmp_path, FAMILY.layouts, config)
    assert source.layout == layout
    source.check()
    for name, tensor in logical_tensors(FAMILY.weights(config)).items():
        whole = Shard(name, tensor.matrix, (0,) * len(tensor.matrix), torch.empty(tensor.matrix))
        assert torch.equal(source(whole), case.weights[name].reshape(tensor.matrix)), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["hub", "in-memory", "transformers-4.52"])
def test_transformers_loads_what_is_written(layout: str, tied: bool, tmp_path: Path) -> None:
    case = make_case(tied=tied)
    write(tmp_path, layout, case.config, case.weights)
    kind = type(oracle(case.config))
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected: Any = oracle(case.config)
    with torch.no_grad():
        for name, param in expected.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
        for document in (case.documents[0], case.documents[6]):
            assert torch.equal(forward(loaded.eval(), document), forward(expected.eval(), document))


def test_original_names_become_the_hubs_by_transformers_conversion() -> None:
    # The steps of convert_llava_onevision_weights_to_hf.py, in its order.
    steps = (
        ("model.vision_tower.", ""),
        ("model.mm_projector", "multi_modal_projector"),
        ("model", "model.model"),
        ("vision_model.model", "vision_model"),
        ("lm_head", "language_model.lm_head"),
        ("model.model", "language_model.model"),
        ("multi_modal_projector.0", "multi_modal_projector.linear_1"),
        ("multi_modal_projector.2", "multi_modal_projector.linear_2"),
        ("language_model.model.image_newline", "image_newline"),
    )
    config = tiny_config()
    originals = list(logical_tensors(FAMILY.layouts["original"].weights(config)))
    converted = []
    for name in originals:
        for old, new in steps:
            name = name.replace(old, new)
        converted.append(name)
    assert converted == list(logical_tensors(FAMILY.weights(config)))
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.image_newline",
        "model.layers.0.self_attn.q_proj.bias",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.norm.weight",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
    } <= set(originals)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_head_may_be_there(layout: str) -> None:
    tied = FAMILY.layouts[layout]
    head = "language_model.lm_head.weight" if layout == "hub" else "lm_head.weight"
    for config, allowed in ((tiny_config(tied=True), [head]), (tiny_config(), [])):
        assert list(tied.copies(config)) == allowed
        assert set(tied.copies(config).values()) <= logical_tensors(tied.weights(config)).keys()


def test_initial_values() -> None:
    config = tiny_config()
    assert FAMILY.initial(config, "image_newline", (64,)) == ("normal", 64**-0.5)
    assert FAMILY.initial(config, "language_model.lm_head.weight", (251, 64)) == ("normal", 0.02)
    assert FAMILY.initial(config, "vision_tower.vision_model.post_layernorm.weight", (32,)) == ("constant", 1.0)
    assert FAMILY.initial(config, "multi_modal_projector.linear_1.bias", (64,)) == ("constant", 0.0)


def test_what_takes_no_part_is_named() -> None:
    def unused(used: int) -> set[str]:
        config = tiny_config(used=used)
        names = [n for n, _ in on_meta(config).named_parameters()]
        return {n for n in names if any(re.fullmatch(pattern, n) for pattern in FAMILY.unused(config))}

    norm = {"vision.post_norm.weight", "vision.post_norm.bias"}
    assert unused(3) == norm
    assert len(unused(2) - norm) == 12 and all(n.startswith("vision.blocks.2.") for n in unused(2) - norm)


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(tied=True), FAMILY.presets["0.5b"]()], ids=["tiny", "tied", "0.5b"]
)
def test_one_sharding_rule_for_every_module_with_parameters(config: LlavaOneVisionConfig) -> None:
    table = FAMILY.sharding(config)
    owners = {name: module for name, module in on_meta(config).named_modules() if module._parameters}
    rules = {name: rule_for(table, name) for name in owners}
    for name, rule in rules.items():
        module = owners[name]
        if isinstance(rule, Column):
            assert isinstance(module, nn.Linear) and sum(rule.segments) == module.out_features, name
        elif isinstance(rule, Row):
            assert isinstance(module, nn.Linear), name
        elif isinstance(rule, Vocab):
            assert isinstance(module, nn.Embedding), name
        else:
            assert not isinstance(rule, Gather)
            assert not isinstance(module, nn.Linear) or name == "vision.patches.project", name
