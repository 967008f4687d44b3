"""Names and shapes of LLaVA-1.5's tensors in its checkpoint layouts.

The oracles are transformers, what it writes with save_pretrained and what it loads from folders in our layouts, and for
the original repository's layout, which transformers does not read, the names that its own state dict has.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tetrascope.engine.logical import Shard
from tetrascope.engine.modules import family_modules
from tetrascope.engine.source import HuggingFaceFolder
from tetrascope.errors import UserError
from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.llava import FAMILY
from tetrascope.models.llava.config import LlavaConfig
from tetrascope.models.sharding import Column, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors, relative
from tetrascope.tools.verify.case import OPTIMIZER
from tetrascope.tools.verify.families.llava import forward, make_case, name_on_disk, oracle, tiny_config

LOADED_BY_TRANSFORMERS = ("hub", "in-memory", "in-memory-4", "transformers-5")

# A name of every kind and its shape, as the original's `LlavaLlamaForCausalLM` has them (haotian-liu/LLaVA,
# llava/model/language_model/llava_llama.py, multimodal_projector/builder.py, multimodal_encoder/clip_encoder.py).
ORIGINAL = {
    "model.embed_tokens.weight": (251, 64),
    "model.layers.4.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.norm.weight": (64,),
    "lm_head.weight": (251, 64),
    "model.mm_projector.0.weight": (64, 32),
    "model.mm_projector.0.bias": (64,),
    "model.mm_projector.2.weight": (64, 64),
    "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": (32,),
    "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight": (32, 3, 14, 14),
    "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight": (10, 32),
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight": (32,),
    "model.vision_tower.vision_tower.vision_model.encoder.layers.2.self_attn.out_proj.bias": (32,),
    "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (64, 32),
    "model.vision_tower.vision_tower.vision_model.post_layernorm.bias": (32,),
}


def on_meta(config: LlavaConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


def layout_shapes(layout: str, config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    tensors = logical_tensors(FAMILY.layouts[layout].weights(config))
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_names_and_shapes_are_those_on_disk(tmp_path: Path) -> None:
    # A model that transformers 5 made itself; what it writes after loading a hub checkpoint is tested further down.
    config = tiny_config()
    for layout, options in (("transformers-5", {}), ("in-memory", {"save_original_format": False})):
        oracle(config).save_pretrained(tmp_path / layout, **options)
        with safe_open(str(tmp_path / layout / "model.safetensors"), framework="pt") as file:
            on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        # Embedding, norm and head, 9 a decoder layer, 16 a CLIP block, 7 around them, 4 of the projector.
        assert len(on_disk) == 3 + 5 * 9 + 3 * 16 + 7 + 4
        assert layout_shapes(layout, config) == on_disk
        assert FAMILY.from_hf(json.loads((tmp_path / layout / "config.json").read_text())) == config
    assert layout_shapes("in-memory", config).keys() == {name for name, _ in oracle(config).named_parameters()}


def test_names_of_the_original() -> None:
    shapes = layout_shapes("original", tiny_config())
    assert {name: shapes.get(name) for name in ORIGINAL} == ORIGINAL
    assert all(name.startswith(("model.", "lm_head.")) for name in shapes)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_a_stack_of_hugging_face_tensors(tied: bool) -> None:
    config = tiny_config(tied=tied)
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes


def write(folder: Path, layout: str, config: LlavaConfig, tensors: dict[str, Tensor], leave_out: str = "^$") -> None:
    """A checkpoint in that layout, put together from the canonical tensors."""
    chosen = FAMILY.layouts[layout]
    written = {}
    for name, pieces in relative(chosen.weights(config), FAMILY.weights(config)).items():
        parts = [tensors[p.tensor.name].reshape(p.tensor.matrix)[p.start : p.start + p.rows] for p in pieces]
        written[name] = torch.cat(parts).reshape(logical_tensors(chosen.weights(config))[name].shape)
    kept = {name: tensor for name, tensor in written.items() if not re.match(leave_out, name)}
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for path, content in chosen.configs(config, "float32").items():
        (folder / path).write_text(json.dumps(content))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_what_is_written_is_read_back_bit_for_bit(layout: str, tied: bool, tmp_path: Path) -> None:
    case = make_case(tied=tied)
    write(tmp_path, layout, case.config, case.weights)
    assert FAMILY.from_hf(json.loads((tmp_path / "config.json").read_text())) == case.config
    source = HuggingFaceFolder(tmp_path, FAMILY.layouts, case.config)
    source.check()
    assert source.layout == layout
    for name, tensor in logical_tensors(FAMILY.weights(case.config)).items():
        whole = Shard(name, tensor.matrix, (0,) * len(tensor.matrix), torch.empty(tensor.matrix))
        assert torch.equal(source(whole), case.weights[name].reshape(tensor.matrix)), name


@pytest.mark.parametrize("layout", LOADED_BY_TRANSFORMERS)
def test_transformers_loads_what_is_written(layout: str, tmp_path: Path) -> None:
    case = make_case()
    write(tmp_path, layout, case.config, case.weights)
    kind = type(oracle(case.config))
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected: Any = oracle(case.config)
    with torch.no_grad():
        for name, param in expected.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
        for document in (case.documents[0], case.documents[3]):
            theirs = [forward(model.eval(), document, case.config) for model in (loaded, expected)]
            assert torch.equal(*theirs)
    if layout == "hub":  # what transformers writes after loading it is the same again
        loaded.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert again.keys() == case.weights.keys()
        assert all(torch.equal(again[name], case.weights[name]) for name in again)


def test_an_original_checkpoint_without_its_vision_tower_is_refused(tmp_path: Path) -> None:
    case = make_case()
    write(tmp_path, "original", case.config, case.weights, leave_out=r"model\.vision_tower")
    with pytest.raises(UserError, match=r"layout 'original', lacks 55 tensors \(model\.vision_tower\.vision_tower"):
        HuggingFaceFolder(tmp_path, FAMILY.layouts, case.config)


def test_buffers_of_old_checkpoints_are_ignored() -> None:
    for layout, prefix in (("hub", "vision_tower."), ("original", "model.vision_tower.vision_tower.")):
        names = {*layout_shapes(layout, tiny_config()), f"{prefix}vision_model.embeddings.position_ids"}
        names |= {"model.layers.0.self_attn.rotary_emb.inv_freq"}
        assert FAMILY.layouts[layout].differences(tiny_config(), names) == ([], [])


@pytest.mark.parametrize("layout", FAMILY.layouts)
def test_a_tied_head_may_be_there(layout: str) -> None:
    chosen = FAMILY.layouts[layout]
    assert not chosen.copies(tiny_config())
    ((copy, embedding),) = chosen.copies(tiny_config(tied=True)).items()
    assert copy in layout_shapes(layout, tiny_config()) and copy not in layout_shapes(layout, tiny_config(tied=True))
    assert embedding in layout_shapes(layout, tiny_config(tied=True))


def test_initial_values() -> None:
    config = tiny_config()
    embeddings = "vision_tower.vision_model.embeddings"
    assert FAMILY.initial(config, f"{embeddings}.class_embedding", (64,)) == ("normal", 0.125)
    assert FAMILY.initial(config, f"{embeddings}.position_embedding.weight", (10, 32)) == ("normal", 0.02)
    assert FAMILY.initial(config, "language_model.model.norm.weight", (64,)) == ("constant", 1.0)
    assert FAMILY.initial(config, "multi_modal_projector.linear_1.bias", (64,)) == ("constant", 0.0)


def test_the_last_block_of_clip_and_the_norm_after_it_are_frozen() -> None:
    modules = family_modules(FAMILY, tiny_config(), OPTIMIZER)
    frozen = {name for name, options in modules.items() if options.frozen}
    assert frozen == {name for name in modules if name.startswith(("vision.blocks.2.", "vision.post_norm."))}


@pytest.mark.parametrize("config", [tiny_config(), FAMILY.presets["7b"]()], ids=["tiny", "7b"])
def test_one_sharding_rule_for_every_module_with_parameters(config: LlavaConfig) -> None:
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
            assert not isinstance(module, nn.Linear) or name == "vision.patches.project", name
    for pattern, _ in table:
        if "scale" not in pattern:
            assert any(re.fullmatch(pattern, name) for name in owners), pattern
