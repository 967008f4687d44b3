"""LLaVA-OneVision's config.json both ways, its published sizes, and what is refused.

The oracle for sizes is transformers' model of the same shape on the meta device; the original repository's config.json
is that of lmms-lab/llava-onevision-qwen2-7b-ov.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.family import family_of
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.llava_onevision.config import PINPOINTS, SIGLIP, LlavaOneVisionConfig
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.verify.families.llava_onevision import oracle, tiny_config

HUB_05B: dict[str, Any] = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "image_grid_pinpoints": [list(canvas) for canvas in PINPOINTS],
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 152000,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_image_newline_parameter": True,
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
"""config.json in the form of transformers 4: rope_theta lies among the decoder's own keys."""

ORIGINAL_7B: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": [list(canvas) for canvas in PINPOINTS],
    "image_split_resolution": None,
    "image_token_index": 151646,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
    "vocab_size": 152064,
}


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With keys replaced, also inside sections (`a.b`)."""
    found = json.loads(json.dumps(raw))
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (found[section] if section else found)[name] = value
    return found


def test_config_json_of_transformers_4() -> None:
    assert FAMILY.from_hf(HUB_05B) == FAMILY.presets["0.5b"]()


def test_config_json_of_the_original() -> None:
    # Its vocabulary is Qwen2's own; transformers' conversion adds to it.
    published = FAMILY.presets["7b"]()
    expected = dataclasses.replace(published, decoder=dataclasses.replace(published.decoder, vocab=152064))
    assert FAMILY.from_hf(ORIGINAL_7B) == expected
    assert family_of(ORIGINAL_7B) == "llava_onevision"


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tied=True, used=2), FAMILY.presets["72b"]()])
def test_config_json_round_trip(config: LlavaOneVisionConfig) -> None:
    for layout in FAMILY.layouts.values():
        raw = json.loads(json.dumps(layout.configs(config, "bfloat16")["config.json"]))
        assert FAMILY.from_hf(raw) == config
        assert family_of(raw) == "llava_onevision"


def test_transformers_reads_our_config_json() -> None:
    from transformers import LlavaOnevisionConfig as HFConfig

    hf: Any = HFConfig.from_dict(FAMILY.to_hf(FAMILY.presets["0.5b"](), "bfloat16"))
    text, vision = hf.text_config, hf.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (896, 24, 2)
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (vision.hidden_size, vision.num_hidden_layers, vision.vision_use_head) == (1152, 26, False)
    assert hf.tie_word_embeddings and hf.vision_feature_layer == -1 and hf.vision_aspect_ratio == "anyres_max_9"
    assert hf.dtype == text.dtype == vision.dtype == torch.bfloat16


# What the model cards round to 0.9, 8 and 73 billion; transformers' model and a count by hand give the same.
COUNTS = {"0.5b": 893_675_552, "7b": 8_030_807_584, "72b": 73_181_570_592}


@pytest.mark.parametrize("size", COUNTS)
def test_parameters_of_the_published_sizes(size: str) -> None:
    config = FAMILY.presets[size]()
    assert sum(math.prod(t.shape) for t in logical_tensors(FAMILY.weights(config)).values()) == COUNTS[size]
    with torch.device("meta"):
        theirs = oracle(config)
    assert sum(param.numel() for param in theirs.parameters()) == COUNTS[size]


def test_parameters_by_hand() -> None:
    h, i, e, m = 896, 4864, 1152, 4304
    layer = (h * h + h) + 2 * (128 * h + 128) + h * h + 3 * h * i + 2 * h
    block = 4 * (e * e + e) + (m * e + m) + (e * m + e) + 4 * e
    siglip = 26 * block + (588 * e + e) + 729 * e + 2 * e
    adaptor = (e * h + h) + (h * h + h) + h
    assert 152000 * h + 24 * layer + h + siglip + adaptor == COUNTS["0.5b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next'"),
        ({"text_config.hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'; only 'silu'"),
        ({"text_config.attention_dropout": 0.1}, "text_config.attention_dropout is 0.1"),
        ({"text_config.use_sliding_window": True}, "use_sliding_window is True"),
        ({"text_config.rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"vision_config.hidden_act": "relu"}, "vision_config.hidden_act is 'relu'; give one of"),
        ({"vision_config.vision_use_head": True}, "vision_use_head is True; only False"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config.model_type is 'clip_vision_model'"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'; only 'qwen2'"),
        ({"vision_feature_select_strategy": "cls"}, r"config\.json: [^|]*vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]; give one block"),
        ({"vision_feature_layer": 0}, "vision_feature_layer is 0"),
        ({"vision_feature_layer": -27}, "vision_feature_layer is -27; .* from -26 to -1"),
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'; give anyres_max_N"),
        ({"image_grid_pinpoints": [[384, 400]]}, r"pinpoints: \[384, 400\] must be multiples of vision.image 384"),
    ],
)
def test_config_json_that_would_compute_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf(changed(HUB_05B, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "mm_vision_tower is 'openai/clip"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; only 'mlp2x_gelu'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_newline_position": "grid"}, "mm_newline_position is 'grid'; only 'one_token'"),
        ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode is 'average'"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride is 4"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
        ({"add_faster_video": True}, "add_faster_video is True"),
        ({"use_pos_skipping": True}, "use_pos_skipping is True"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, r"image_grid_pinpoints is '\(1x1\).*write it as a list"),
        ({"image_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'; give anyres_max_N"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ],
)
def test_config_json_of_an_original_with_other_rules_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf(changed(ORIGINAL_7B, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"hidden": 66}}, "hidden 66 must be an even multiple of heads 4"),
        ({"decoder": {"kv_heads": 3}}, "heads 4 must be a multiple of kv_heads 3"),
        ({"decoder": {"heads": 0}}, r"decoder\.heads: 0 must be greater than 0"),
        ({"vision": {"width": 33}}, "width 33 must be a multiple of heads 2"),
        ({"vision": {"layers": -1}}, r"vision\.layers: -1 must be greater than 0"),
        ({"vision": {"used": 4}}, "used: 4 is more than layers 3"),
        ({"vision": {"patch": 15}}, "patch: 15 is more than image 14"),
        ({"vision": {"activation": "relu"}}, "activation: 'relu' must be one of quick_gelu"),
        ({"vision": {"class_token": True}}, "class_token: SigLIP has none"),
        ({"vision": {"patch_bias": False}}, "patch_bias: SigLIP has one"),
        ({"pinpoints": ()}, "pinpoints: empty"),
        ({"pinpoints": ((14, 20),)}, r"pinpoints: \[14, 20\] must be multiples"),
        ({"max_views": 0}, "max_views: 0 must be at least 1"),
        ({"single_image": "padded"}, "single_image: 'padded' must be 'anyres' or 'square'"),
        ({"multi_image": "square"}, "multi_image: 'square' must be 'padded' or 'anyres'"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    good = dataclasses.asdict(tiny_config())
    good["decoder"]["head_dim"] = 0
    for key, value in changes.items():
        good[key] = {**good[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        validated(LlavaOneVisionConfig, good, "model.config")


def test_a_configuration_needs_little_besides_the_decoder() -> None:
    decoder = {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 251}
    ids = {"image_token_id": 0, "video_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = validated(LlavaOneVisionConfig, {"decoder": decoder, **ids}, "model.config")
    assert config.vision == SIGLIP and config.pinpoints == PINPOINTS and config.max_views == 9
    assert config.positions.rule == "default" and config.decoder.qkv_bias
    assert config.vision_cost.adaptor == 64 * (1152 + 64)
