"""VILA's three folders: names, shapes, and numbers there and back.

The oracle is transformers for the two towers, which it writes and loads, and torch's nn.Sequential for the projector.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipVisionModel

from tests.models.longvila.conftest import SPECIALS, make_tokenizer
from tests.tools.checkpoint_convert.convert_jobs import hf_to_native
from tetrascope.engine.logical import Shard
from tetrascope.engine.source import HuggingFaceFolder, read_hf_config
from tetrascope.errors import UserError
from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.layers.collect import Collect
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.sharding import Column, Gather, Replicated, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.longvila import Reference, forward, make_case, name_on_disk, oracle, tiny_config
from tetrascope.tools.verify.pool import WorkerPool

CONFIGS = {
    "untied": tiny_config(),
    "tied, pooling head": tiny_config(order="columns", tied=True, pooling_head=True),
    "linear": tiny_config("linear"),
    "mlp2x_gelu": tiny_config("mlp2x_gelu"),
}


def filled(case: Case) -> Reference:
    """The reference with the case's weights."""
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return model


def write(folder: Path, case: Case, layout: str = "vila") -> Path:
    """A VILA checkpoint: what transformers writes of the towers, and the projector's state dict."""
    model = filled(case)
    files = FAMILY.layouts[layout].configs(case.config, "float32")
    model.llm.save_pretrained(folder / "llm")
    model.vision_tower.save_pretrained(folder / "vision_tower")
    (folder / "mm_projector").mkdir()
    save_file(model.mm_projector.state_dict(), str(folder / "mm_projector" / "model.safetensors"))
    if layout == "vila":  # transformers 4 had one level of names more
        tower = folder / "vision_tower" / "model.safetensors"
        named = {f"vision_model.{name}": tensor for name, tensor in load_file(tower).items()}
        save_file(named, str(tower), metadata={"format": "pt"})
    for path in ("config.json", "mm_projector/config.json"):
        (folder / path).write_text(json.dumps(files[path]))
    return folder


def on_meta(config: LongVilaConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_is_a_stack_of_tensors(config: LongVilaConfig) -> None:
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes


@pytest.mark.parametrize("layout", FAMILY.layouts)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_vila_writes_is_read_bit_by_bit(config: LongVilaConfig, layout: str, tmp_path: Path) -> None:
    case = make_case(config)
    write(tmp_path, case, layout)
    assert FAMILY.from_hf(read_hf_config(tmp_path)) == config
    source = HuggingFaceFolder(tmp_path, FAMILY.layouts, config)
    source.check()
    assert source.layout == layout
    logical = logical_tensors(FAMILY.weights(config))
    assert logical.keys() == case.weights.keys()
    for name, tensor in logical.items():
        whole = Shard(name, tensor.matrix, (0,) * len(tensor.matrix), torch.empty(tensor.matrix))
        assert torch.equal(source(whole), case.weights[name].reshape(tensor.matrix)), name


def test_a_tensor_too_many_is_not_overlooked(tmp_path: Path) -> None:
    # A pooling head that vision_tower/config.json does not speak of.
    case = make_case(tiny_config(pooling_head=True))
    write(tmp_path, case)
    with pytest.raises(UserError, match=r"holds 11 tensors \(vision_tower/vision_model\.head\.attention\.in_proj_bias"):
        HuggingFaceFolder(tmp_path, FAMILY.layouts, tiny_config())


@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_converted_by_two_ranks_and_loaded_by_transformers(layout: str, pool: WorkerPool, tmp_path: Path) -> None:
    case = make_case(CONFIGS["tied, pooling head"])
    hf = write(tmp_path / "hf", case)
    native = tmp_path / "native"
    native.mkdir()
    make_tokenizer(SPECIALS).save_pretrained(str(native / "tokenizer"))
    assert pool.run(hf_to_native, "longvila", hf, native, Layout(tp=2), world=2) == ["vila"] * 2
    native_to_hf(native / "step-000000", tmp_path / "out", "float32", layout=layout)

    out = tmp_path / "out"
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "config.json",
        "llm/config.json",
        "llm/generation_config.json",
        "llm/model.safetensors",
        "llm/tokenizer.json",
        "llm/tokenizer_config.json",
        "mm_projector/config.json",
        "mm_projector/model.safetensors",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    }
    assert len(AutoTokenizer.from_pretrained(out / "llm")) == 259
    assert FAMILY.from_hf(read_hf_config(out)) == case.config
    expected, found = filled(case), oracle(case.config)
    for part, kind in (("llm", Qwen2ForCausalLM), ("vision_tower", SiglipVisionModel)):
        loaded: Any = None
        loaded, info = kind.from_pretrained(out / part, output_loading_info=True, attn_implementation="eager")
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        setattr(found, part, loaded)
    found.mm_projector.load_state_dict(load_file(out / "mm_projector" / "model.safetensors"))
    with torch.no_grad():
        for document in (case.documents[0], case.documents[6]):
            ours: Tensor = forward(found.eval(), document, case.config)
            assert torch.equal(ours, forward(expected.eval(), document, case.config))


def test_a_tied_head_may_be_there() -> None:
    for layout in FAMILY.layouts.values():
        for config, allowed in ((CONFIGS["tied, pooling head"], ["llm/lm_head.weight"]), (CONFIGS["untied"], [])):
            assert list(layout.copies(config)) == allowed
            assert set(layout.copies(config).values()) <= logical_tensors(layout.weights(config)).keys()


def test_initial_values() -> None:
    config = tiny_config()
    tower = "vision_tower/vision_model"
    assert FAMILY.initial(config, "mm_projector/layers.2.weight", (64, 128)) == ("normal", 0.02)
    assert FAMILY.initial(config, f"{tower}.embeddings.position_embedding.weight", (9, 32)) == ("normal", 0.02)
    assert FAMILY.initial(config, f"{tower}.head.probe", (32,)) == ("normal", 0.02)
    assert FAMILY.initial(config, f"{tower}.head.attention.in_proj_bias", (96,)) == ("constant", 0.0)
    assert FAMILY.initial(config, "mm_projector/layers.1.weight", (128,)) == ("constant", 1.0)
    assert FAMILY.initial(config, "mm_projector/layers.1.bias", (128,)) == ("constant", 0.0)
    assert FAMILY.initial(config, "llm/model.norm.weight", (64,)) == ("constant", 1.0)


@pytest.mark.parametrize("config", [*CONFIGS.values(), FAMILY.presets["7b"]()], ids=[*CONFIGS, "7b"])
def test_one_sharding_rule_for_every_module_with_parameters(config: LongVilaConfig) -> None:
    table = FAMILY.sharding(config)
    modules = on_meta(config).named_modules()
    owners = {name: module for name, module in modules if module._parameters or isinstance(module, Collect)}
    for name, module in owners.items():
        rule = rule_for(table, name)
        if isinstance(rule, Column):
            assert isinstance(module, nn.Linear) and sum(rule.segments) == module.out_features, name
        elif isinstance(rule, Row):
            assert isinstance(module, nn.Linear), name
        elif isinstance(rule, Vocab):
            assert isinstance(module, nn.Embedding), name
        elif isinstance(rule, Gather):
            assert isinstance(module, Collect), name
        else:
            alone = name == "vision.patches.project" or (name == "adaptor.fc1" and config.projector == "linear")
            assert isinstance(rule, Replicated)
            assert not isinstance(module, nn.Linear) or alone or name.startswith("vision.pool."), name
    unmatched = {pattern for pattern, _ in table if not any(re.fullmatch(pattern, name) for name in owners)}
    assert unmatched <= {r"vision\.pool(\..*)?", r"vision\.(pre|post)_norm", r"vision\.blocks\.\d+\.(norm|scale)[12]"}
