"""InternVL's config.json: OpenGVLab's own form (`internvl_chat`) and transformers' (`internvl`), both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import need, reads_config_json
from tetrascope.models.internvl.config import InternViTShape, InternVLConfig, InternVLDecoder
from tetrascope.models.layers.positions import PositionRule

LANGUAGE_MODELS = {"InternLM2ForCausalLM": "internlm2", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
"""`llm_config.architectures` -> kind of decoder."""

END_OF_TURN = {("internlm2", 2): 92542, ("llama", 2): 92542, ("qwen2", 151643): 151645}
"""(kind, eos_token_id in config.json) -> `<|im_end|>`: published files name the token that ends a text, not a turn."""

PADS = {"internlm2": 2, "qwen2": 151643, "llama": 2}
"""Padding token where config.json names none."""


@reads_config_json
def from_hf(raw: dict[str, Any]) -> InternVLConfig:
    """From the contents of config.json, of either form.

    Raises UserError for another model's configuration and for options that would change what the model computes.
    """
    if raw.get("model_type") == "internvl_chat":
        return _from_opengvlab(raw)
    if raw.get("model_type") == "internvl":
        return _from_transformers(raw)
    raise UserError(
        f"config.json: model_type is {raw.get('model_type')!r}; the family internvl needs 'internvl_chat' or 'internvl'"
    )


def _demand(raw: Mapping[str, Any], where: str, needed: Mapping[str, Any]) -> None:
    """Raises UserError unless each field is absent or has the one value that is available."""
    for field, value in needed.items():
        need(where + field, raw.get(field, value), value)


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise UserError(f"config.json: {name} is missing; expected an object with the shapes of that part")
    return section


def _from_opengvlab(raw: dict[str, Any]) -> InternVLConfig:
    llm, vision = _section(raw, "llm_config"), _section(raw, "vision_config")
    _demand(raw, "", {"select_layer": -1, "ps_version": "v2", "downsample_ratio": 0.5, "pad2square": False})
    if "ps_version" not in raw:
        raise UserError("config.json: ps_version is missing, which means 'v1'; only 'v2' is available")
    _demand(vision, "vision_config.", {"qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm"})
    if "qk_normalization" not in vision or "norm_type" not in vision or "qkv_bias" not in vision:
        # OpenGVLab's defaults are those of InternViT-6B, whose query-key norm and RMSNorm are not available.
        raise UserError("config.json: vision_config needs qk_normalization, qkv_bias and norm_type to be given")
    size = vision.get("image_size", 224)
    if raw.get("force_image_size") not in (None, size):
        raise UserError(
            f"config.json: force_image_size is {raw['force_image_size']}, vision_config.image_size {size}; "
            "resizing the position table is not available, both must be equal"
        )
    names = llm.get("architectures") or [""]
    if names[0] not in LANGUAGE_MODELS:
        raise UserError(f"config.json: llm_config.architectures is {names}; available are {', '.join(LANGUAGE_MODELS)}")
    kind = LANGUAGE_MODELS[names[0]]
    _demand(llm, "llm_config.", {"bias": False})
    decoder, rope_factor = _decoder(llm, "llm_config.", kind, _tied(raw, llm))
    return InternVLConfig(
        decoder=decoder,
        vision=_vision(vision, "vision_config."),
        # OpenGVLab's files do not hold it; it is the third of the nine tokens added at the vocabulary's end.
        image_token_id=raw.get("img_context_token_id", decoder.vocab - 7),
        eos_token_id=_end_of_turn(llm, kind, decoder.vocab),
        pad_token_id=_pad(llm, kind, decoder.vocab),
        initializer_range=llm.get("initializer_range", 0.02),
        max_positions=llm.get("max_position_embeddings", 32768),
        rope_scaling_factor=rope_factor,
        **_use({"max_dynamic_patch": 6, "use_thumbnail": False} | llm | raw),  # V2PE's fields may lie in either
    )


def _from_transformers(raw: dict[str, Any]) -> InternVLConfig:
    text, vision = dict(_section(raw, "text_config")), _section(raw, "vision_config")
    kind = text.get("model_type", "qwen2")
    if kind not in ("qwen2", "llama"):
        raise UserError(f"config.json: text_config.model_type is {kind!r}; available are 'qwen2' and 'llama'")
    _demand(
        raw,
        "",
        {
            "downsample_ratio": 0.5,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
    )
    _demand(
        vision,
        "vision_config.",
        {
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "use_mask_token": False,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
        },
    )
    if not vision.get("attention_bias", False):
        raise UserError("config.json: vision_config.attention_bias is false; only true is available")
    _demand(text, "text_config.", {"attention_bias": False, "mlp_bias": False})
    # transformers' class ties the embeddings unless told otherwise.
    decoder, rope_factor = _decoder(text, "text_config.", kind, bool(raw.get("tie_word_embeddings", True)))
    return InternVLConfig(
        decoder=decoder,
        vision=_vision(vision, "vision_config."),
        image_token_id=raw.get("image_token_id", 151667),
        eos_token_id=_end_of_turn(text, kind, decoder.vocab),
        pad_token_id=_pad(text, kind, decoder.vocab),
        initializer_range=text.get("initializer_range", 0.02),
        max_positions=text.get("max_position_embeddings", 32768),
        rope_scaling_factor=rope_factor,
        **_use({"max_dynamic_patch": 12, "use_thumbnail": True, "template": "internvl2_5"} | raw),
    )


def _use(raw: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures, conversations and positions are made: OpenGVLab's fields, which we also put into transformers'
    form, where they mean nothing to transformers. The fields of V2PE are named as its scripts' arguments."""
    dynamic = raw.get("dynamic_image_size", True)
    version = raw.get("rope_pos_id_version") or "default"
    return {
        "positions": PositionRule(version, int(raw.get("rope_pos_id_stride") or 256)),
        "min_tiles": raw.get("min_dynamic_patch", 1) if dynamic else 1,
        "max_tiles": raw["max_dynamic_patch"] if dynamic else 1,
        "thumbnail": raw["use_thumbnail"],
        "template": raw.get("template") or "",
        "system_message": raw.get("system_message"),
    }


def _to_use(config: InternVLConfig) -> dict[str, Any]:
    """The inverse of `_use`."""
    fields: dict[str, Any] = {
        "dynamic_image_size": config.max_tiles > 1,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.thumbnail,
        "template": config.chat_template,
        "system_message": config.system_message,
    }
    if config.positions.rule != "default":
        fields |= {"rope_pos_id_version": config.positions.rule, "rope_pos_id_stride": config.positions.stride}
    return fields


def _tied(raw: Mapping[str, Any], llm: Mapping[str, Any]) -> bool:
    """The language model's own setting counts: OpenGVLab's class makes it from llm_config alone."""
    return bool(llm.get("tie_word_embeddings", raw.get("tie_word_embeddings", False)))


def _decoder(raw: Mapping[str, Any], where: str, kind: str, tied: bool) -> tuple[InternVLDecoder, float]:
    """The decoder's shape, and the factor of its dynamic rotary scaling (0: none)."""
    _demand(raw, where, {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False})
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "dynamic"):
        raise UserError(f"config.json: {where}rope type is {scaling!r}; available are 'default' and 'dynamic'")
    try:
        decoder = InternVLDecoder(
            hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            vocab=raw["vocab_size"],
            rms_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            qkv_bias=kind == "qwen2",
            tied_embeddings=tied,
            head_dim=raw.get("head_dim") or 0,
            kind=kind,
        )
    except KeyError as error:
        raise UserError(f"config.json: {where}{error.args[0]} is missing") from error
    return decoder, float(rope["factor"]) if scaling == "dynamic" else 0.0


def _vision(raw: Mapping[str, Any], where: str) -> InternViTShape:
    """The encoder's shape; field names are the same in both forms, defaults those of transformers."""
    _demand(raw, where, {"hidden_act": "gelu"})
    for field in ("attention_dropout", "dropout", "hidden_dropout_prob", "projection_dropout"):
        _demand(raw, where, {field: 0.0})
    return InternViTShape(
        width=raw.get("hidden_size", 1024),
        layers=raw.get("num_hidden_layers", 24),
        heads=raw.get("num_attention_heads", 16),
        mlp=raw.get("intermediate_size", 4096),
        image=_side(raw.get("image_size", 448), where + "image_size"),
        patch=_side(raw.get("patch_size", 14), where + "patch_size"),
        channels=raw.get("num_channels", 3),
        norm_eps=raw.get("layer_norm_eps", 1e-6),
    )


def _side(size: int | Sequence[int], where: str) -> int:
    """transformers gives height and width."""
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise UserError(f"config.json: {where} is {sides}; only squares are available")
    return sides[0]


def _end_of_turn(raw: Mapping[str, Any], kind: str, vocab: int) -> int:
    given: Any = raw.get("eos_token_id")
    token: int | None = given[0] if isinstance(given, list) else given
    if token is None:
        return 151645 if kind == "qwen2" else 92542
    turn = END_OF_TURN.get((kind, token))
    return token if turn is None or turn >= vocab else turn


def _pad(raw: Mapping[str, Any], kind: str, vocab: int) -> int:
    given: int | None = raw.get("pad_token_id")
    return min(PADS[kind], vocab - 1) if given is None else given


def to_opengvlab(config: InternVLConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json in OpenGVLab's form. The published `*.py` files belong beside it."""
    d, v = config.decoder, config.vision
    llm = _text(config, dtype) | {
        "architectures": [name for name, kind in LANGUAGE_MODELS.items() if kind == d.kind],
        "model_type": d.kind,
        "torch_dtype": dtype,
        "rope_theta": d.rope_theta,
        "tie_word_embeddings": d.tied_embeddings,
    }
    if config.rope_scaling_factor:
        llm["rope_scaling"] = {"type": "dynamic", "factor": config.rope_scaling_factor}
    if d.kind == "internlm2":
        llm["bias"] = False
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "torch_dtype": dtype,
        "downsample_ratio": 0.5,
        "force_image_size": v.image,
        "img_context_token_id": config.image_token_id,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        **_to_use(config),
        "tie_word_embeddings": d.tied_embeddings,
        "llm_config": llm,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "torch_dtype": dtype,
            "hidden_size": v.width,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "intermediate_size": v.mlp,
            "image_size": v.image,
            "patch_size": v.patch,
            "num_channels": v.channels,
            "layer_norm_eps": v.norm_eps,
            "hidden_act": "gelu",
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    }


def to_transformers(config: InternVLConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json as transformers 5 writes it. InternLM2 becomes the Llama that it computes."""
    d, v = config.decoder, config.vision
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": d.rope_theta}
    if config.rope_scaling_factor:
        rope |= {"rope_type": "dynamic", "factor": config.rope_scaling_factor}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": dtype,
        "tie_word_embeddings": d.tied_embeddings,
        "image_token_id": config.image_token_id,
        "image_seq_length": config.tile_tokens,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        **_to_use(config),
        "text_config": _text(config, dtype)
        | {
            "model_type": "qwen2" if d.kind == "qwen2" else "llama",
            "dtype": dtype,
            "tie_word_embeddings": d.tied_embeddings,
            "rope_parameters": rope,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "dtype": dtype,
            "hidden_size": v.width,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "intermediate_size": v.mlp,
            "image_size": [v.image, v.image],
            "patch_size": [v.patch, v.patch],
            "num_channels": v.channels,
            "layer_norm_eps": v.norm_eps,
            "hidden_act": "gelu",
            "norm_type": "layer_norm",
            "attention_bias": True,
            "use_qk_norm": False,
            "use_mask_token": False,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
        },
    }


def _text(config: InternVLConfig, dtype: str) -> dict[str, Any]:
    """What both forms say of the decoder in the same words."""
    d = config.decoder
    return {
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "vocab_size": d.vocab,
        "rms_norm_eps": d.rms_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
