"""config.json of InternVL in OpenGVLab's and in transformers' form, published sizes, and what is refused.

Counts of the published sizes: by hand from the widths below, and from transformers' model of the same shape (InternLM2
as a Llama), built without memory.
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
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.config import InternViTShape, InternVLConfig, InternVLDecoder
from tetrascope.models.internvl.hf_config import to_opengvlab, to_transformers
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.verify.families.internvl import oracle, tiny_config

HUB_2B: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": 92553,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}
"""config.json of OpenGVLab/InternVL2-2B, without what concerns generation."""

HUB_3_1B = {
    **HUB_2B,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "moe_config": None,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "pad2square": False,
    "system_message": None,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
}
"""config.json of OpenGVLab/InternVL3-1B, likewise."""


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one field set, or taken away (None), at a path such as `llm_config.bias`."""
    copy = json.loads(json.dumps(raw))
    *sections, field = path.split(".")
    place = copy
    for section in sections:
        place = place[section]
    if value is None:
        place.pop(field, None)
    else:
        place[field] = value
    return copy


def test_config_json_of_the_hub() -> None:
    assert FAMILY.from_hf(HUB_2B) == FAMILY.presets["internvl2-2b"]()
    assert FAMILY.from_hf(HUB_3_1B) == FAMILY.presets["internvl3-1b"]()
    ids = {name: preset().image_token_id for name, preset in FAMILY.presets.items()}
    assert (ids["internvl2-2b"], ids["internvl2-1b"], ids["internvl3-8b"]) == (92546, 151648, 151667)


CONFIGS = [
    *(preset() for preset in FAMILY.presets.values()),
    *(tiny_config(kind, tied=tied) for kind in ("qwen2", "internlm2", "llama") for tied in (False, True)),
    tiny_config("internlm2", PositionRule("v2pe_rnd")),
    tiny_config("internlm2", PositionRule("v2pe_fix", 64)),
    dataclasses.replace(tiny_config(), min_tiles=2, max_tiles=9, thumbnail=False, image_token_id=9),
    dataclasses.replace(tiny_config(), template="Hermes-2", system_message="x"),
    dataclasses.replace(tiny_config(), max_tiles=1, rope_scaling_factor=0.0, system_message=""),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_opengvlabs_form_both_ways(config: InternVLConfig) -> None:
    raw = json.loads(json.dumps(to_opengvlab(config, "bfloat16")))
    assert FAMILY.from_hf(raw) == dataclasses.replace(config, template=config.chat_template)
    assert raw["torch_dtype"] == raw["llm_config"]["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_form_both_ways(config: InternVLConfig) -> None:
    # InternLM2 is called a Llama there. Tiling, template, system message and V2PE come along as fields of ours.
    kind = "llama" if config.decoder.kind == "internlm2" else config.decoder.kind
    decoder = dataclasses.replace(config.decoder, kind=kind)
    expected = dataclasses.replace(config, decoder=decoder, template=config.chat_template)
    assert FAMILY.from_hf(json.loads(json.dumps(to_transformers(config, "bfloat16")))) == expected


OUR_FIELDS = ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail", "template")


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_transformers_own_config_json(kind: str) -> None:
    config = tiny_config(kind)
    theirs = oracle(config).config
    ours = FAMILY.from_hf(to_transformers(config, "float32"))
    assert FAMILY.from_hf(json.loads(theirs.to_json_string())) == ours  # it keeps our fields
    published = {field: value for field, value in theirs.to_dict().items() if field not in OUR_FIELDS}
    assert FAMILY.from_hf(published) == dataclasses.replace(ours, template="internvl2_5")


def test_transformers_ties_embeddings_unless_told_otherwise() -> None:
    raw = to_transformers(tiny_config(), "float32")
    del raw["tie_word_embeddings"]
    from transformers import InternVLConfig as HFConfig

    assert HFConfig.from_dict(raw).tie_word_embeddings and FAMILY.from_hf(raw).decoder.tied_embeddings


@pytest.mark.parametrize("config", CONFIGS[-5:])
def test_the_configuration_survives_a_checkpoint(config: InternVLConfig) -> None:
    assert validated(FAMILY.config_class, json.loads(json.dumps(dataclasses.asdict(config))), "here") == config


COUNTS = {
    # ViT 304,012,288; what OpenGVLab's pages give (938.16M, 2205.75M, 8075.37M; 2.5: 938.19M, 3712.64M; 3: 0.94B to
    # 7.94B) is these numbers rounded.
    "internvl2-1b": 938_158_976,
    "internvl2-2b": 2_205_754_368,
    "internvl2-8b": 8_075_365_376,
    "internvl2_5-1b": 938_193_024,
    "internvl2_5-2b": 2_205_754_368,
    "internvl2_5-4b": 3_712_637_952,
    "internvl2_5-8b": 8_075_365_376,
    "internvl3-1b": 938_193_024,
    "internvl3-2b": 2_088_957_440,
    "internvl3-8b": 7_944_373_760,
}


def by_hand(config: InternVLConfig) -> int:
    """Parameters from the widths alone."""
    d, e, m = config.decoder, 1024, 4096
    # Class token, positions, patches; a block: two norms, two scales, qkv, proj, two linears.
    vit = e + 1025 * e + 588 * e + e + 24 * (4 * e + 2 * e + 3 * e * (e + 1) + e * (e + 1) + m * (e + 1) + e * (m + 1))
    adaptor = 2 * 4 * e + d.hidden * (4 * e + 1) + d.hidden * (d.hidden + 1)
    qkv = (d.heads + 2 * d.kv_heads) * (d.hidden // d.heads)
    attention = qkv * (d.hidden + (d.kind == "qwen2")) + d.hidden * d.hidden
    layer = 2 * d.hidden + attention + 3 * d.hidden * d.intermediate
    return vit + adaptor + d.layers * layer + 2 * d.vocab * d.hidden + d.hidden


@pytest.mark.parametrize("name", FAMILY.presets)
def test_published_parameter_counts(name: str) -> None:
    config = FAMILY.presets[name]()
    found = sum(math.prod(tensor.shape) for tensor in logical_tensors(FAMILY.weights(config)).values())
    assert found == by_hand(config) == COUNTS[name]


@pytest.mark.parametrize("name", ["internvl2-2b", "internvl3-1b", "internvl3-8b"])
def test_transformers_counts_alike(name: str) -> None:
    with torch.device("meta"):
        model = oracle(FAMILY.presets[name]())
    assert sum(param.numel() for param in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "internvl_gpt", "model_type is 'internvl_gpt'"),
        ("select_layer", -2, "select_layer is -2; only -1"),
        ("ps_version", "v1", "ps_version is 'v1'; only 'v2'"),
        ("ps_version", None, "ps_version is missing"),
        ("downsample_ratio", 0.25, "downsample_ratio is 0.25"),
        ("pad2square", True, "pad2square is True"),
        ("force_image_size", 896, "force_image_size is 896, vision_config.image_size 448"),
        ("template", "phi3-chat", "template: 'phi3-chat' must be one of"),
        ("rope_pos_id_version", "v2pe_log", "positions.rule: 'v2pe_log'"),
        ("vision_config.qk_normalization", True, "vision_config.qk_normalization is True"),
        ("vision_config.norm_type", "rms_norm", "vision_config.norm_type is 'rms_norm'"),
        ("vision_config.norm_type", None, "vision_config needs qk_normalization, qkv_bias and norm_type"),
        ("vision_config.qkv_bias", False, "vision_config.qkv_bias is False"),
        ("vision_config.hidden_act", "relu", "vision_config.hidden_act is 'relu'"),
        ("vision_config.dropout", 0.1, "vision_config.dropout is 0.1"),
        ("vision_config", None, "vision_config is missing"),
        ("llm_config.architectures", ["Phi3ForCausalLM"], r"llm_config.architectures is \['Phi3ForCausalLM'\]"),
        ("llm_config.bias", True, "llm_config.bias is True"),
        ("llm_config.hidden_act", "gelu", "llm_config.hidden_act is 'gelu'"),
        ("llm_config.rope_scaling", {"type": "linear", "factor": 2.0}, "llm_config.rope type is 'linear'"),
        ("llm_config.hidden_size", None, "llm_config.hidden_size is missing"),
    ],
)
def test_options_of_opengvlabs_form_that_are_not_available(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf(changed(HUB_2B, path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision_feature_layer", -2, "vision_feature_layer is -2"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy is 'full'"),
        ("downsample_ratio", 1.0, "downsample_ratio is 1.0"),
        ("projector_hidden_act", "relu", "projector_hidden_act is 'relu'"),
        ("vision_config.attention_bias", None, "vision_config.attention_bias is false"),
        ("vision_config.use_qk_norm", True, "vision_config.use_qk_norm is True"),
        ("vision_config.norm_type", "rms_norm", "vision_config.norm_type is 'rms_norm'"),
        ("vision_config.use_mean_pooling", False, "vision_config.use_mean_pooling is False"),
        ("vision_config.use_absolute_position_embeddings", False, "use_absolute_position_embeddings is False"),
        ("vision_config.image_size", [448, 224], r"vision_config.image_size is \[448, 224\]; only squares"),
        ("text_config.model_type", "qwen3", "text_config.model_type is 'qwen3'"),
        ("text_config.use_sliding_window", True, "text_config.use_sliding_window is True"),
    ],
)
def test_options_of_transformers_form_that_are_not_available(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.from_hf(changed(to_transformers(tiny_config(), "float32"), path, value))


@pytest.mark.parametrize(
    ("decoder", "vision", "rest", "message"),
    [
        ({"hidden": 66}, {}, {}, "hidden 66 must be an even multiple of heads 4"),
        ({"kv_heads": 3}, {}, {}, "heads 4 must be a multiple of kv_heads 3"),
        ({"heads": 0}, {}, {}, r"decoder\.heads: 0 must be greater than 0"),
        ({"kind": "phi3"}, {}, {}, "kind: 'phi3' must be one of internlm2, qwen2, llama"),
        ({"qkv_bias": False}, {}, {}, "qwen2 needs qkv_bias true"),
        ({"kind": "llama"}, {}, {}, "llama needs qkv_bias false"),
        ({}, {"width": 33}, {}, "width 33 must be a multiple of heads 2"),
        ({}, {"image": 42}, {}, "image 42 must be a multiple of 2 x patch 14"),
        ({}, {"class_token": False}, {}, "InternViT needs class_token"),
        ({}, {"used": 1}, {}, "used equal to layers"),
        ({}, {"image": 28, "heads": 8}, {}, "a tile's 5 rows must be more than heads 8"),
        ({}, {}, {"min_tiles": 13}, "min_tiles 13 must be between 1 and max_tiles 12"),
        ({}, {}, {"template": "mine"}, "template: 'mine' must be one of"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    decoder: dict[str, Any], vision: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    good = tiny_config()
    with pytest.raises(UserError, match=message):
        InternVLConfig(
            **{
                **vars(good),
                "decoder": InternVLDecoder(**{**vars(good.decoder), "head_dim": 0, **decoder}),
                "vision": InternViTShape(**{**vars(good.vision), "used": 0, **vision}),
                **rest,
            }
        )
