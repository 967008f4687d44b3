"""LongVILA's configuration files both ways, published sizes, and shapes that do not fit.

Sizes are counted by hand from the papers' shapes and compared with transformers' Qwen2ForCausalLM and
SiglipVisionModel on the meta device, tensor by tensor; the projector is VILA's nn.Sequential.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.family import family_of
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.verify.families.longvila import Projector, tiny_config

LLM: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "model_max_length": 262144,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_theta": 207112184,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
TOWER: dict[str, Any] = {
    "architectures": ["SiglipVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-06,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "torch_dtype": "bfloat16",
    "vision_use_head": False,
}
TOP: dict[str, Any] = {
    "architectures": ["LlavaLlamaModel"],
    "fps": 0.0,
    "hidden_size": 3584,
    "image_aspect_ratio": "resize",
    "interpolate_mode": "linear",
    "llm_cfg": "llm",
    "mm_hidden_size": 1152,
    "mm_projector_cfg": "mm_projector",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "cls_patch",
    "mm_vision_select_layer": -2,
    "model_dtype": "torch.bfloat16",
    "model_type": "llava_llama",
    "num_video_frames": 256,
    "s2": False,
    "tune_language_model": True,
    "vision_resolution": -1,
    "vision_tower_cfg": "vision_tower",
    "llm": LLM,
    "mm_projector": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"},
    "vision_tower": TOWER,
}
"""Files of a VILA checkpoint with Qwen2-7B after 256k of stage 4, as its repository writes them, read together."""


def changed(section: str | None, **values: Any) -> dict[str, Any]:
    raw = copy.deepcopy(TOP)
    (raw if section is None else raw[section]).update(values)
    return raw


EXTENDED = dataclasses.replace(
    FAMILY.presets["7b"](),
    decoder=dataclasses.replace(FAMILY.presets["7b"]().decoder, rope_theta=207112184.0),
    frames=256,
    max_positions=262144,
)


def test_a_checkpoint_of_three_folders() -> None:
    before = copy.deepcopy(TOP)
    assert FAMILY.from_hf(TOP) == EXTENDED
    assert before == TOP and family_of(TOP) == "longvila"


def test_parts_inside_the_config_json() -> None:
    raw = {key: value for key, value in TOP.items() if key not in ("llm", "mm_projector", "vision_tower")}
    with pytest.raises(UserError, match=r"llm_cfg is 'llm', and llm/config\.json is missing"):
        FAMILY.from_hf(raw)
    raw |= {f"{part}_cfg": TOP[part] for part in ("llm", "mm_projector", "vision_tower")}
    assert FAMILY.from_hf(raw) == EXTENDED


def test_a_folders_own_file_counts() -> None:
    stale = changed(None, llm_cfg={**LLM, "rope_theta": 1000000.0})
    assert FAMILY.from_hf(stale).decoder.rope_theta == 207112184.0


def test_rotary_base_in_the_form_of_transformers_5() -> None:
    llm = {key: value for key, value in LLM.items() if key != "rope_theta"}
    llm["rope_parameters"] = {"rope_type": "default", "rope_theta": 3580165449.0}
    assert FAMILY.from_hf(changed(None, llm=llm)).decoder.rope_theta == 3580165449.0


def test_a_vocabulary_without_room_for_an_image_token() -> None:
    # Stages that resized the embedding to the tokenizer: its padding token stands for images then.
    assert FAMILY.from_hf(changed("llm", vocab_size=151648, pad_token_id=151647)).image_token_id == 151647
    # Published ones name none: Qwen2's tokenizers pad with <|endoftext|>, which ends no turn.
    assert FAMILY.from_hf(changed("llm", vocab_size=151648, pad_token_id=None)).image_token_id == 151643
    with pytest.raises(UserError, match="image_token_id: 151645 is eos_token_id too"):
        FAMILY.from_hf(changed("llm", vocab_size=151648, pad_token_id=151645))


def by_hand(hidden: int, intermediate: int, kv_width: int, vocab: int, tied: bool) -> int:
    """SigLIP so400m: 588·1152 patch, 729 places, 27 blocks of four square linears, an MLP and two norms, a norm."""
    e, mlp = 1152, 4304
    block = 4 * (e * e + e) + (e * mlp + mlp) + (mlp * e + e) + 4 * e
    vision = 588 * e + e + 729 * e + 27 * block + 2 * e
    projector = 2 * 4 * e + (4 * e * hidden + hidden) + (hidden * hidden + hidden)
    attention = hidden * hidden + hidden + 2 * (hidden * kv_width + kv_width) + hidden * hidden
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return vision + projector + 28 * layer + hidden + vocab * hidden * (1 if tied else 2)


@pytest.mark.parametrize(
    ("name", "language", "hand"),
    [
        # Qwen2's own counts: 1.54B and 7.62B parameters (arXiv 2407.10671, table 1; safetensors headers on the hub).
        ("1.5b", 1543714304, by_hand(1536, 8960, 256, 151936, True)),
        ("7b", 7615616512, by_hand(3584, 18944, 512, 152064, False)),
    ],
)
def test_published_sizes(name: str, language: int, hand: int) -> None:
    config = FAMILY.presets[name]()
    files = FAMILY.layouts["vila"].configs(config, "bfloat16")
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "llm/": Qwen2ForCausalLM(Qwen2Config.from_dict(files["llm/config.json"])),
            "mm_projector/": Projector(config),
            "vision_tower/": SiglipVisionModel(SiglipVisionConfig.from_dict(files["vision_tower/config.json"])),
        }
    theirs = {
        folder + name: tuple(param.shape) for folder, part in parts.items() for name, param in part.named_parameters()
    }
    ours = {
        name: tensor.shape
        for name, tensor in logical_tensors(FAMILY.layouts["vila-transformers-5"].weights(config)).items()
    }
    assert ours == theirs
    assert sum(math.prod(s) for n, s in ours.items() if n.startswith("llm/")) == language
    assert sum(math.prod(shape) for shape in ours.values()) == hand


def test_vila_names_the_tower_with_one_level_more() -> None:
    config = FAMILY.presets["7b"]()
    names = logical_tensors(FAMILY.weights(config)).keys()
    assert "vision_tower/vision_model.encoder.layers.26.mlp.fc2.bias" in names
    projector = [name for name in names if name.startswith("mm_projector/")]
    assert projector == [f"mm_projector/layers.{i}.{part}" for i in (1, 2, 4) for part in ("weight", "bias")]


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(order="columns", tied=True, pooling_head=True),
        tiny_config("linear"),
        tiny_config("mlp_downsample_2x2_fix"),
        *(preset() for preset in FAMILY.presets.values()),
        EXTENDED,
    ],
)
def test_config_json_round_trip(config: LongVilaConfig) -> None:
    files = json.loads(json.dumps(FAMILY.layouts["vila"].configs(config, "bfloat16")))
    assert files["config.json"] == FAMILY.to_hf(config, "bfloat16") and family_of(files["config.json"]) == "longvila"
    assert FAMILY.from_hf(files["config.json"]) == config
    parts = {path.removesuffix("/config.json"): content for path, content in files.items() if "/" in path}
    assert FAMILY.from_hf({**files["config.json"], **parts}) == config
    # As transformers 5 writes the towers' files.
    parts["llm"] = Qwen2Config.from_dict(parts["llm"]).to_dict()
    parts["vision_tower"] = SiglipVisionConfig.from_dict(parts["vision_tower"]).to_dict()
    assert FAMILY.from_hf({**files["config.json"], **parts}) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(None, model_type="llava"), "model_type is 'llava'; the family longvila needs 'llava_llama'"),
        (changed(None, image_aspect_ratio="dynamic_s2"), "image_aspect_ratio is 'dynamic_s2'; only 'resize'"),
        (changed(None, mm_vision_select_feature="patch"), "mm_vision_select_feature is 'patch'; only 'cls_patch'"),
        (changed(None, mm_use_im_start_end=True), "mm_use_im_start_end is True"),
        (changed(None, s2=True), "s2 is True"),
        (changed(None, mm_vision_select_layer=0), "mm_vision_select_layer is 0"),
        (changed(None, vision_resolution=448), "vision_resolution is 448; only 384"),
        (changed(None, hidden_size=2048), "hidden_size is 2048; only 3584"),
        (changed(None, mm_hidden_size=3456), "mm_hidden_size is 3456; only 1152"),
        (changed(None, mm_token_order="zigzag"), r"token_order: 'zigzag' must be 'rows' or 'columns'"),
        (changed("llm", model_type="llama"), r"llm\.model_type is 'llama'; the family longvila needs 'qwen2'"),
        (changed("llm", rope_scaling={"type": "linear", "factor": 8.0}), "rope_type is 'linear'; only 'default'"),
        (changed("llm", use_sliding_window=True), r"llm\.use_sliding_window is True"),
        (changed("llm", hidden_act="gelu"), r"llm\.hidden_act is 'gelu'"),
        (changed("llm", eos_token_id=None), r"llm\.eos_token_id is missing"),
        (changed("mm_projector", mm_projector_type="mlp_downsample_3x3_fix"), "mm_projector_type is 'mlp_downsample_3"),
        (changed("mm_projector", mm_projector_type=None), "mm_projector_type is None; available are mlp_downsample"),
        (changed("vision_tower", model_type="clip_vision_model"), "needs 'siglip_vision_model'"),
        (changed("vision_tower", hidden_act="relu"), r"vision_tower\.hidden_act is 'relu'"),
    ],
)
def test_config_json_that_would_compute_something_else_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf(raw)


def test_the_pooling_head_is_carried_where_there_is_one() -> None:
    config = FAMILY.from_hf(changed("vision_tower", vision_use_head=True))
    assert config.vision.pooling_head and config.vision.used == 26
    names = {name for name in logical_tensors(FAMILY.weights(config)) if ".head." in name}
    assert len(names) == 11 and "vision_tower/vision_model.head.attention.in_proj_weight" in names


@pytest.mark.parametrize(
    ("decoder", "vision", "rest", "message"),
    [
        ({"layers": -1}, {}, {}, r"decoder\.layers: -1 must be greater than 0"),
        ({"heads": 5, "head_dim": 0}, {}, {}, "must be an even multiple of heads 5"),
        ({"kv_heads": 3}, {}, {}, "heads 4 must be a multiple of kv_heads 3"),
        ({"qkv_bias": False}, {}, {}, r"decoder\.qkv_bias: must be True in LongVILA"),
        ({}, {"width": 33}, {}, "width 33 must be a multiple of heads 2"),
        ({}, {"class_token": True}, {}, r"vision\.class_token: must be False in LongVILA"),
        ({}, {"image": 3}, {}, "image 3 must be at least patch 4"),
        ({}, {"used": 4}, {}, "used: 4 is more than layers 3"),
        ({}, {"activation": "relu"}, {}, "activation: 'relu' must be one of"),
        ({}, {}, {"projector": "identity"}, "projector: 'identity' must be one of"),
        ({}, {}, {"projector": "linear", "token_order": "columns"}, "linear has no order but 'rows'"),
        ({}, {}, {"frames": 0}, "frames: 0 must be greater than 0"),
        ({}, {}, {"image_token_id": 251}, "image_token_id: 251 must be an id of the decoder's vocabulary of 251"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    decoder: dict[str, Any], vision: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    good = tiny_config()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(
            good,
            decoder=dataclasses.replace(good.decoder, **decoder),
            vision=dataclasses.replace(good.vision, **vision),
            **rest,
        )


def test_a_configuration_of_a_run() -> None:
    raw = dataclasses.asdict(tiny_config())
    assert validated(FAMILY.config_class, raw, "model.config") == tiny_config()
    with pytest.raises(UserError, match="unknown key 'token_ordr'; did you mean 'token_order'"):
        validated(FAMILY.config_class, {**raw, "token_ordr": "rows"}, "model.config")
