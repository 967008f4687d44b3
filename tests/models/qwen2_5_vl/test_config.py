"""config.json of Qwen2.5-VL both ways, published sizes, and shapes that do not fit.

Parameter counts are those of transformers' model on the meta device, built from the published config.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig as HFConfig
from transformers import Qwen2_5_VLForConditionalGeneration

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.family import family_of
from tetrascope.models.qwen2_5_vl import FAMILY
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.verify.families.qwen2_5_vl import tiny_config

HUB_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 151936,
}
"""config.json in the flat form of transformers 4."""


def preset(name: str) -> Qwen2_5VLConfig:
    config: Qwen2_5VLConfig = FAMILY.presets[name]()
    return config


def paper_rule(config: Qwen2_5VLConfig) -> Qwen2_5VLConfig:
    """config.json does not say which position rule is meant: it is the paper's."""
    return dataclasses.replace(config, position_rule="paper")


@pytest.mark.parametrize(("size", "count"), [("3b", 3_754_622_976), ("7b", 8_292_166_656), ("72b", 73_410_777_344)])
def test_published_parameter_counts(size: str, count: int) -> None:
    config = preset(size)
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(HFConfig.from_dict(FAMILY.to_hf(config, "bfloat16")))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    tensors = logical_tensors(FAMILY.weights(config))
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == count


def test_flat_config_json_of_the_hub() -> None:
    assert FAMILY.from_hf(HUB_3B) == preset("3b")
    assert family_of(HUB_3B) == "qwen2_5_vl"


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(tied=True), *(preset(name) for name in FAMILY.presets)], ids=repr
)
def test_config_json_round_trip(config: Qwen2_5VLConfig) -> None:
    raw = json.loads(json.dumps(FAMILY.to_hf(config, "bfloat16")))
    assert FAMILY.from_hf(raw) == paper_rule(config)
    # And once more through transformers, which writes fields of its own.
    assert FAMILY.from_hf(json.loads(HFConfig.from_dict(raw).to_json_string(use_diff=False))) == paper_rule(config)


def test_transformers_reads_our_config_json() -> None:
    hf: Any = HFConfig.from_dict(FAMILY.to_hf(preset("72b"), "bfloat16"))
    text, vision = hf.text_config, hf.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (8192, 80, 8)
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    assert (vision.hidden_size, vision.intermediate_size, vision.out_hidden_size) == (1280, 3456, 8192)
    assert (vision.window_size, vision.tokens_per_second) == (112, 2)
    assert list(vision.fullatt_block_indexes) == [7, 15, 23, 31]
    assert not hf.tie_word_embeddings and hf.dtype == text.dtype == torch.bfloat16


def test_tie_may_sit_in_the_text_part() -> None:
    raw = FAMILY.to_hf(tiny_config(tied=True), "float32")
    del raw["tie_word_embeddings"]
    assert FAMILY.from_hf(raw).decoder.tied_embeddings


def test_a_configuration_of_the_users_own() -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(tiny_config())))
    assert validated(Qwen2_5VLConfig, plain, "model.config") == tiny_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "rope parameters .*yarn"),
        ({"rope_scaling": {"type": "default"}}, "mrope_section"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'; only 'silu'"),
        ({"attention_dropout": 0.1}, "text_config.attention_dropout is 0.1"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act is 'quick_gelu'; only 'silu'"),
        ({"vision_config": {"out_hidden_size": 3584}}, "vision_config.out_hidden_size is 3584; only 2048"),
        ({"vision_config": {"patch_size": [14, 14]}}, r"vision_config.patch_size is .14, 14.; give one whole number"),
        (
            {"vision_config": {"rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}},
            "vision_config.rope_parameters is .*500",
        ),
    ],
    ids=str,
)
def test_config_json_that_would_compute_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    vision = {**HUB_3B["vision_config"], **change.get("vision_config", {})}
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf({**HUB_3B, **change, "vision_config": vision})


@pytest.mark.parametrize(
    ("decoder", "vision", "rest", "message"),
    [
        ({"hidden": 66, "head_dim": 0}, {}, {}, "hidden 66 must be an even multiple of heads 4"),
        ({"kv_heads": 3}, {}, {}, "heads 4 must be a multiple of kv_heads 3"),
        ({"layers": -1}, {}, {}, r"decoder\.layers: -1 must be greater than 0"),
        ({}, {"width": 36}, {}, "width 36 must be a multiple of 4 x heads 2"),
        ({}, {"tokens_per_second": 0}, {}, r"vision\.tokens_per_second: 0 must be greater than 0"),
        ({}, {"window": 27}, {}, r"vision\.window: 27 pixels must hold a merged patch of 28 pixels"),
        ({}, {"full_attention": (1, 3)}, {}, r"full_attention: \[1, 3\] must be ascending numbers of the 3"),
        ({}, {"full_attention": (2, 1)}, {}, r"full_attention: \[2, 1\] must be ascending"),
        ({}, {}, {"mrope_section": (2, 3, 4)}, r"mrope_section: \[2, 3, 4\] must sum to half the head width, 8"),
        ({}, {}, {"position_rule": "mine"}, "position_rule: 'mine' must be 'paper' or 'hf'"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    decoder: dict[str, int], vision: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    good = tiny_config()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(
            good,
            decoder=dataclasses.replace(good.decoder, **decoder),
            vision=dataclasses.replace(good.vision, **vision),
            **rest,
        )


def test_cost_counts_windows_and_frames_apart() -> None:
    # Two of three blocks attend inside windows; a gate beside up and down.
    cost = tiny_config().vision_cost
    assert (cost.attention, cost.window_attention) == (1 * 2 * 32, 2 * 2 * 32)
    assert cost.linears == 3 * (4 * 32 * 32 + 3 * 32 * 44)
    assert cost.adaptor == 128 * 128 + 128 * 64 and cost.patch == 1176 * 32
