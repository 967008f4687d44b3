"""LLaVA-OneVision's config.json, both ways: transformers' form and the original repository's."""

from __future__ import annotations

import re
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import first_token, need, reads_config_json
from tetrascope.models.layers.vit import ACTIVATIONS, ViTShape
from tetrascope.models.llava_onevision.config import SIGLIP, LlavaOneVisionConfig, LlavaOneVisionDecoder

ARCHITECTURES = ("LlavaOnevisionForConditionalGeneration", "LlavaQwenForCausalLM")
"""transformers' name and the original's."""

TOWER = "google/siglip-so400m-patch14-384"
IMAGE_TOKEN, VIDEO_TOKEN, EOS_TOKEN, PAD_TOKEN = 151646, 151647, 151645, 151643

TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "attention_dropout",
    "use_sliding_window",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
)
"""Keys of Qwen2's configuration, which lie at the top of the original's config.json."""


@reads_config_json
def from_hf(raw: dict[str, Any]) -> LlavaOneVisionConfig:
    """From the contents of config.json: transformers' (4.x or 5.x) or the original repository's.

    Raises UserError for another model's configuration and for options that would change what the model computes.
    """
    from transformers import LlavaOnevisionConfig as HFConfig

    if "mm_vision_tower" in raw:
        raw = _as_transformers(raw)
    if raw.get("model_type") != "llava_onevision":
        raise UserError(
            f"config.json: model_type is {raw.get('model_type')!r}; the family llava_onevision needs 'llava_onevision'"
        )
    hf: Any = HFConfig.from_dict(raw)
    text = hf.text_config
    _need(
        ("text_config.model_type", text.model_type, "qwen2"),
        ("vision_config.model_type", hf.vision_config.model_type, "siglip_vision_model"),
    )
    rope = text.rope_parameters
    _need(
        ("text_config.hidden_act", text.hidden_act, "silu"),
        ("text_config.attention_dropout", text.attention_dropout, 0),
        ("text_config.use_sliding_window", text.use_sliding_window, False),
        ("text_config.rope_parameters.rope_type", rope.get("rope_type"), "default"),
        ("projector_hidden_act", hf.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", hf.multimodal_projector_bias, True),
        ("vision_feature_select_strategy", hf.vision_feature_select_strategy, "full"),
    )
    max_views = re.fullmatch(r"anyres_max_(\d+)", hf.vision_aspect_ratio)
    if max_views is None:
        raise UserError(f"config.json: vision_aspect_ratio is {hf.vision_aspect_ratio!r}; give anyres_max_N")
    return LlavaOneVisionConfig(
        decoder=LlavaOneVisionDecoder(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            vocab=text.vocab_size,
            rms_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            tied_embeddings=bool(hf.tie_word_embeddings),
        ),
        vision=_vision(hf),
        image_token_id=hf.image_token_id,
        video_token_id=hf.video_token_id,
        eos_token_id=first_token(text.eos_token_id, EOS_TOKEN),
        pad_token_id=first_token(text.pad_token_id, PAD_TOKEN),
        pinpoints=tuple((int(height), int(width)) for height, width in hf.image_grid_pinpoints),
        max_views=int(max_views[1]),
        initializer_range=text.initializer_range,
        max_positions=text.max_position_embeddings,
    )


def _need(*options: tuple[str, Any, Any]) -> None:
    for what, found, needed in options:
        need(what, found, needed)


def _vision(hf: Any) -> ViTShape:
    vision, layer = hf.vision_config, hf.vision_feature_layer
    _need(
        ("vision_config.vision_use_head", vision.vision_use_head, False),
        ("vision_config.attention_dropout", vision.attention_dropout, 0),
    )
    if vision.hidden_act not in ACTIVATIONS:
        raise UserError(f"config.json: vision_config.hidden_act is {vision.hidden_act!r}; give one of {[*ACTIVATIONS]}")
    # Of the hidden states, 0 is the embedding and -1 the last block's output.
    if not isinstance(layer, int) or not -vision.num_hidden_layers <= layer <= -1:
        raise UserError(
            f"config.json: vision_feature_layer is {layer!r}; give one block counted from the end, "
            f"from -{vision.num_hidden_layers} to -1"
        )
    return ViTShape(
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp=vision.intermediate_size,
        image=vision.image_size,
        patch=vision.patch_size,
        channels=vision.num_channels,
        used=vision.num_hidden_layers + layer + 1,
        activation=vision.hidden_act,
        norm_eps=vision.layer_norm_eps,
        post_norm=True,
    )


def _as_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    """The original's config.json in transformers' form.

    There the encoder is named, not described: SigLIP so400m with the last block deleted on loading, whose output is
    taken before the final norm whatever `mm_vision_select_layer` says (llava/model/multimodal_encoder/
    siglip_encoder.py). `vision_config` describes it where a checkpoint written by `to_original` has another shape.
    """
    vision = raw.get("vision_config")
    if vision is None and raw["mm_vision_tower"] != TOWER:
        raise UserError(f"config.json: mm_vision_tower is {raw['mm_vision_tower']!r}; only {TOWER!r} is available")
    defaults = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_resampler_type": None,
        "mm_use_im_start_end": False,
        "add_faster_video": False,
        "use_pos_skipping": False,
    }
    _need(*((key, raw.get(key, default), default) for key, default in defaults.items()))
    pinpoints = raw.get("image_grid_pinpoints")
    if not isinstance(pinpoints, list):
        raise UserError(f"config.json: image_grid_pinpoints is {pinpoints!r}; write it as a list of [height, width]")
    found = {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **{key: raw[key] for key in TEXT_FIELDS if key in raw}},
        "vision_config": vision or _vision_to_hf(SIGLIP),
        "vision_aspect_ratio": str(raw.get("image_aspect_ratio")),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }
    optional = ("image_grid_pinpoints", "image_token_index", "video_token_index", "vision_feature_layer")
    return {**found, **{key: raw[key] for key in optional if key in raw}}


def to_hf(config: LlavaOneVisionConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json, in the form that transformers 5 writes."""
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llava_onevision",
        "dtype": dtype,
        "tie_word_embeddings": config.decoder.tied_embeddings,
        "image_token_index": config.image_token_id,
        "video_token_index": config.video_token_id,
        "image_grid_pinpoints": [list(canvas) for canvas in config.pinpoints],
        "vision_aspect_ratio": f"anyres_max_{config.max_views}",
        "vision_feature_layer": config.vision.used - config.vision.layers - 1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "text_config": {
            **_text_to_hf(config),
            "model_type": "qwen2",
            "dtype": dtype,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.decoder.rope_theta},
        },
        "vision_config": {**_vision_to_hf(config.vision), "dtype": dtype},
    }


def _text_to_hf(config: LlavaOneVisionConfig) -> dict[str, Any]:
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
        "use_sliding_window": False,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": d.tied_embeddings,
        "bos_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _vision_to_hf(shape: ViTShape) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_channels": shape.channels,
        "image_size": shape.image,
        "patch_size": shape.patch,
        "hidden_act": shape.activation,
        "layer_norm_eps": shape.norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    }


def to_original(config: LlavaOneVisionConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json as the original repository writes it (lmms-lab/llava-onevision-qwen2-*).

    `vision_config`, `vision_feature_layer` and the token ids besides are ours, for encoders of another shape; the
    original ignores them. Its vocabulary may be as large as ours.
    """
    return {
        "architectures": [ARCHITECTURES[1]],
        "model_type": "llava",
        "torch_dtype": dtype,
        **_text_to_hf(config),
        "rope_theta": config.decoder.rope_theta,
        "rope_scaling": None,
        "image_aspect_ratio": f"anyres_max_{config.max_views}",
        "image_grid_pinpoints": [list(canvas) for canvas in config.pinpoints],
        "mm_vision_tower": TOWER,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "bilinear",
        "mm_resampler_type": None,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "use_mm_proj": True,
        "image_token_index": config.image_token_id,
        "video_token_index": config.video_token_id,
        "vision_feature_layer": config.vision.used - config.vision.layers - 1,
        "vision_config": _vision_to_hf(config.vision),
    }
