"""LLaVA-1.5's config.json in its forms, and the published sizes.

The oracle for sizes is transformers' model on the meta device, built from the same config.json; the figures for
CLIP (303.5M) and projector (21.0M) are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from tetrascope.errors import UserError
from tetrascope.models.family import family_of
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.llava import FAMILY
from tetrascope.models.llava.config import LlavaConfig, LlavaDecoder, LlavaVision
from tetrascope.models.llava.hf_config import to_original
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.verify.families.llava import oracle, tiny_config

HUB_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
"""llava-hf/llava-1.5-7b-hf, most of the text fields left to their defaults."""

ORIGINAL_13B: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}
"""liuhaotian/llava-v1.5-13b."""


def changed(config: LlavaConfig, **changes: Any) -> LlavaConfig:
    return dataclasses.replace(config, **changes)


def count(config: LlavaConfig, prefix: str = "") -> int:
    tensors = logical_tensors(FAMILY.weights(config)).items()
    return sum(math.prod(tensor.shape) for name, tensor in tensors if name.startswith(prefix))


@pytest.mark.parametrize(("size", "total"), [("7b", 7_063_427_072), ("13b", 13_351_494_656)])
def test_parameter_counts_are_those_of_transformers(size: str, total: int) -> None:
    config = FAMILY.presets[size]()
    with torch.device("meta"):
        model = oracle(config)
    assert count(config) == sum(param.numel() for param in model.parameters()) == total


def test_parameter_counts_of_the_parts() -> None:
    config = FAMILY.presets["7b"]()
    assert round(count(config, "vision_tower.") / 1e6, 1) == 303.5
    assert round(count(config, "multi_modal_projector.") / 1e6, 1) == 21.0
    assert (config.vision.rows, config.vision.used, config.typical.tokens) == (577, 23, 576)


def test_costs_follow_from_the_shapes() -> None:
    config = FAMILY.presets["7b"]()
    cost = config.vision_cost
    assert cost.patch == 588 * 1024 and cost.adaptor == 1024 * 4096 + 4096**2
    assert cost.linears == 23 * 12 * 1024**2 and cost.attention == 23 * 2 * 1024


def test_config_json_of_the_hub() -> None:
    assert FAMILY.from_hf(HUB_7B) == FAMILY.presets["7b"]()
    assert family_of(HUB_7B) == "llava"


def test_config_json_of_the_original() -> None:
    # Its vocabulary has neither an image's nor a pad token: <unk> stands for both.
    big = FAMILY.presets["13b"]()
    expected = changed(
        big, decoder=dataclasses.replace(big.decoder, vocab=32000), image_token_id=0, pad_token_id=0, aspect="pad"
    )
    assert FAMILY.from_hf(ORIGINAL_13B) == expected
    assert FAMILY.from_hf({**ORIGINAL_13B, "model_type": "llava_llama"}) == expected
    assert FAMILY.from_hf({**ORIGINAL_13B, "image_aspect_ratio": "square"}) == changed(expected, aspect="crop")
    smaller = FAMILY.from_hf({**ORIGINAL_13B, "mm_vision_tower": "/models/clip-vit-large-patch14/"})
    assert (smaller.vision.image, smaller.vision.width) == (224, 1024)
    assert family_of(ORIGINAL_13B) == "llava"


OTHERS = [
    tiny_config(),
    tiny_config(tied=True),
    changed(tiny_config(), aspect="pad"),
    changed(tiny_config(), vision=LlavaVision(width=32, layers=3, heads=2, mlp=64, image=42, used=3)),
    changed(tiny_config(), vision=LlavaVision(32, 3, 2, 64, 56, patch=28, used=1, activation="gelu", norm_eps=1e-6)),
    changed(tiny_config(), decoder=LlavaDecoder(64, 96, 5, 4, 2, 251, rms_eps=1e-6, rope_theta=5e5, head_dim=32)),
    FAMILY.presets["13b"](),
]


@pytest.mark.parametrize("config", OTHERS)
@pytest.mark.parametrize("write", [FAMILY.to_hf, to_original])
def test_config_json_round_trip(config: LlavaConfig, write: Any) -> None:
    assert FAMILY.from_hf(json.loads(json.dumps(write(config, "bfloat16")))) == config


def test_positions_are_not_part_of_config_json() -> None:
    config = tiny_config(PositionRule("v2pe_rnd"))
    assert FAMILY.from_hf(FAMILY.to_hf(config, "float32")) == tiny_config()


def test_transformers_reads_our_config_json() -> None:
    hf = oracle(tiny_config()).config
    assert (hf.image_seq_length, hf.vision_feature_layer, hf.image_token_index) == (9, -2, 0)
    text = hf.text_config
    assert (text.vocab_size, text.num_key_value_heads, text.rope_parameters["rope_theta"]) == (251, 2, 1e4)
    assert (hf.vision_config.hidden_act, hf.vision_config.image_size) == ("quick_gelu", 42)


def nested(section: str, **changes: Any) -> dict[str, Any]:
    return {section: {**HUB_7B[section], **changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next'"),
        (nested("text_config", model_type="mistral"), r"text_config\.model_type is 'mistral'; .* needs 'llama'"),
        (nested("vision_config", model_type="siglip_vision_model"), r"vision_config\.model_type is 'siglip_vision"),
        (nested("text_config", hidden_act="gelu"), r"text_config\.hidden_act is 'gelu'; only 'silu'"),
        (nested("text_config", attention_bias=True), r"text_config\.attention_bias is True"),
        (nested("text_config", mlp_bias=True), r"text_config\.mlp_bias is True"),
        (nested("text_config", attention_dropout=0.1), r"text_config\.attention_dropout is 0\.1"),
        (
            nested("text_config", rope_scaling={"rope_type": "linear", "factor": 2.0}),
            r"text_config\.rope_parameters\.rope_type is 'linear'",
        ),
        (nested("vision_config", hidden_act="relu"), r"vision_config\.hidden_act is 'relu'"),
        (nested("vision_config", attention_dropout=0.1), r"vision_config\.attention_dropout is 0\.1"),
        (nested("vision_config", num_channels=4), r"vision_config\.num_channels is 4"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({"vision_feature_layer": 25}, "vision_feature_layer is 25"),
        ({"vision_feature_layer": 0}, "vision_feature_layer is 0"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    ],
)
def test_config_json_that_would_compute_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf({**HUB_7B, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_vision_select_layer": 99}, "mm_vision_select_layer is 99"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower is 'google/siglip-so400m'"),
        ({"mm_hidden_size": 1152}, "mm_hidden_size is 1152; only 1024"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_parameters\.rope_type is 'linear'"),
    ],
)
def test_an_original_that_would_compute_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf({**ORIGINAL_13B, **change})


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("decoder", {"hidden": 66, "head_dim": 0}, "hidden 66 must be an even multiple of heads 4"),
        ("decoder", {"head_dim": 15}, "must be an even multiple of heads 4"),
        ("decoder", {"kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ("decoder", {"layers": 0}, r"decoder\.layers: 0 must be greater than 0"),
        ("decoder", {"qkv_bias": True}, r"decoder\.qkv_bias: must be False"),
        ("decoder", {"qk_norm": True}, r"decoder\.qk_norm: must be False"),
        ("vision", {"width": 33}, "width 33 must be a multiple of heads 2"),
        ("vision", {"image": 43}, "image 43 must be a multiple of patch 14"),
        ("vision", {"used": 4}, r"vision\.used: 4 is more than layers 3"),
        ("vision", {"activation": "relu"}, r"vision\.activation: 'relu' must be one of"),
        ("vision", {"class_token": False}, r"vision\.class_token: must be True"),
        ("vision", {"patch_bias": True}, r"vision\.patch_bias: must be False"),
        ("", {"aspect": "anyres"}, r"aspect: 'anyres' must be 'crop' or 'pad'"),
    ],
)
def test_shapes_that_do_not_fit_are_named(section: str, change: dict[str, Any], message: str) -> None:
    good = tiny_config()
    with pytest.raises(UserError, match=message):
        changed(good, **({section: dataclasses.replace(getattr(good, section), **change)} if section else change))
