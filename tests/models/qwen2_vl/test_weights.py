"""Names, shapes and config.json of Qwen2-VL.

The oracle is what transformers writes with save_pretrained, read back from the files: that is what users load, and
its names differ from those in memory. Parameter counts are those of the published checkpoints,
which the shapes alone must give.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tetrascope.errors import UserError
from tetrascope.models.family import Stage
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, Qwen2VLDecoder, Qwen2VLVision
from tetrascope.models.sharding import Column, Row, Vocab, rule_for
from tetrascope.models.weights import check_cover, logical_tensors
from tetrascope.tools.verify.families.qwen2_vl import oracle, tiny_config


def published(size: str) -> Qwen2VLConfig:
    """The models that Qwen published, with their special tokens."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = {
        "2B": (1536, 8960, 28, 12, 2, 151936, True),
        "7B": (3584, 18944, 28, 28, 4, 152064, False),
        "72B": (8192, 29568, 80, 64, 8, 152064, False),
    }[size]
    return Qwen2VLConfig(
        decoder=Qwen2VLDecoder(hidden, intermediate, layers, heads, kv_heads, vocab, tied_embeddings=tied),
        vision=Qwen2VLVision(width=1280, layers=32, heads=16),
        mrope_section=(16, 24, 24),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        eos_token_id=151645,
        pad_token_id=151643,
    )


HUB_2B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vocab_size": 151936,
}
"""config.json in the flat form of transformers 4, most of the vision fields left to their defaults."""


def on_meta(config: Qwen2VLConfig) -> nn.Module:
    with torch.device("meta"):
        return FAMILY.build(config, Stage(range(config.decoder.layers), True, True), sdpa_attention)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_on_disk(tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tied)
    oracle(config).save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    # Embedding and norm, 12 a decoder layer, 12 a vision block, patch embedding, 6 of the merger, a head of its own.
    assert len(on_disk) == 2 + 5 * 12 + 2 * 12 + 1 + 6 + (not tied)
    assert {name: tensor.shape for name, tensor in logical_tensors(FAMILY.weights(config)).items()} == on_disk
    assert FAMILY.from_hf(json.loads((tmp_path / "config.json").read_text())) == paper_rule(config)


def paper_rule(config: Qwen2VLConfig) -> Qwen2VLConfig:
    """config.json does not say which position rule is meant: it is the paper's."""
    return Qwen2VLConfig(**{**vars(config), "position_rule": "paper"})


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_a_stack_of_hugging_face_tensors(tied: bool) -> None:
    config = tiny_config(tied)
    shapes = {n: tuple(p.shape) for n, p in on_meta(config).named_parameters(remove_duplicate=False)}
    for layout in FAMILY.layouts.values():
        table = layout.weights(config)
        check_cover(table)
        assert {n: (sum(p.rows for p in ps), *ps[0].tensor.matrix[1:]) for n, ps in table.items()} == shapes


@pytest.mark.parametrize(("size", "billions"), [("2B", "2.21"), ("7B", "8.29"), ("72B", "73.4")])
def test_published_parameter_counts(size: str, billions: str) -> None:
    tensors = logical_tensors(FAMILY.weights(published(size)))
    count = sum(math.prod(tensor.shape) for tensor in tensors.values()) / 1e9
    assert f"{count:.{len(billions.partition('.')[2])}f}" == billions


def test_matrix_view_of_a_convolution_kernel() -> None:
    (kernel,) = FAMILY.weights(tiny_config())["vision.patch_embed.weight"]
    assert kernel.tensor.shape == (32, 3, 2, 14, 14) and kernel.tensor.matrix == (32, 1176)


@pytest.mark.parametrize("tied", [False, True])
def test_in_memory_layout_has_the_names_in_memory(tied: bool) -> None:
    config = tiny_config(tied)
    names = {name for name, _ in oracle(config).named_parameters()}
    assert logical_tensors(FAMILY.layouts["in-memory"].weights(config)).keys() == names


def test_the_first_layout_is_the_canonical_one() -> None:
    config = tiny_config()
    assert next(iter(FAMILY.layouts.values())).weights(config) == FAMILY.weights(config)


@pytest.mark.parametrize("layout", ["hub", "in-memory"])
def test_a_tied_head_may_be_there(layout: str) -> None:
    tied = FAMILY.layouts[layout]
    for config, allowed in ((tiny_config(tied=True), ["lm_head.weight"]), (tiny_config(), [])):
        assert list(tied.copies(config)) == allowed
        assert set(tied.copies(config).values()) <= logical_tensors(tied.weights(config)).keys()


def test_initial_values() -> None:
    config = tiny_config()
    assert FAMILY.initial(config, "lm_head.weight", (251, 64)) == ("normal", 0.02)
    assert FAMILY.initial(config, "model.norm.weight", (64,)) == ("constant", 1.0)
    assert FAMILY.initial(config, "visual.merger.ln_q.bias", (32,)) == ("constant", 0.0)


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tied=True), published("2B"), published("72B")])
def test_config_json_round_trip(config: Qwen2VLConfig) -> None:
    raw = json.loads(json.dumps(FAMILY.to_hf(config, "bfloat16")))
    assert FAMILY.from_hf(raw) == paper_rule(config)


def test_transformers_reads_our_config_json() -> None:
    from transformers import Qwen2VLConfig as HFConfig

    hf: Any = HFConfig.from_dict(FAMILY.to_hf(published("2B"), "bfloat16"))
    text, vision = hf.text_config, hf.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (1536, 28, 2)
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    assert (vision.embed_dim, vision.depth, vision.num_heads, vision.hidden_size) == (1280, 32, 16, 1536)
    assert hf.tie_word_embeddings and hf.dtype == text.dtype == torch.bfloat16


def test_flat_config_json_of_the_hub() -> None:
    assert FAMILY.from_hf(HUB_2B) == published("2B")


def test_tie_may_sit_in_the_text_part() -> None:
    raw = FAMILY.to_hf(tiny_config(tied=True), "float32")
    del raw["tie_word_embeddings"]
    assert FAMILY.from_hf(raw).decoder.tied_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}},
            "rope parameters .*yarn",
        ),
        ({"rope_scaling": {"type": "default"}}, "mrope_section"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'; only 'silu'"),
        ({"attention_dropout": 0.1}, "text_config.attention_dropout is 0.1"),
        ({"vision_config": {**HUB_2B["vision_config"], "hidden_act": "relu"}}, "vision_config.hidden_act is 'relu'"),
    ],
)
def test_config_json_that_would_compute_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf({**HUB_2B, **change})


@pytest.mark.parametrize(
    ("decoder", "vision", "rest", "message"),
    [
        ({"hidden": 66}, {}, {}, "hidden 66 must be an even multiple of heads 4"),
        ({"hidden": 60}, {}, {}, "hidden 60 must be an even multiple of heads 4"),
        ({"kv_heads": 3}, {}, {}, "heads 4 must be a multiple of kv_heads 3"),
        ({"heads": 0}, {}, {}, r"decoder\.heads: 0 must be greater than 0"),
        ({"layers": -1}, {}, {}, r"decoder\.layers: -1 must be greater than 0"),
        ({}, {"width": 36}, {}, "width 36 must be a multiple of 4 x heads 2"),
        ({}, {"merge": 0}, {}, r"vision\.merge: 0 must be greater than 0"),
        (
            {},
            {},
            {"mrope_section": (2, 3, 4)},
            r"mrope_section: \[2, 3, 4\] must sum to half the head width, 8",
        ),
        ({}, {}, {"mrope_section": (-1, 5, 4)}, r"mrope_section: \[-1, 5, 4\]"),
        ({}, {}, {"position_rule": "mine"}, "position_rule: 'mine' must be 'paper' or 'hf'"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    decoder: dict[str, int], vision: dict[str, int], rest: dict[str, Any], message: str
) -> None:
    good = tiny_config()
    with pytest.raises(UserError, match=message):
        Qwen2VLConfig(
            **{
                **vars(good),
                "decoder": Qwen2VLDecoder(**{**vars(good.decoder), "head_dim": 0, **decoder}),
                "vision": Qwen2VLVision(**{**vars(good.vision), **vision}),
                **rest,
            }
        )


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tied=True), published("2B")], ids=["tiny", "tied", "2B"])
def test_one_sharding_rule_for_every_module_with_parameters(config: Qwen2VLConfig) -> None:
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
