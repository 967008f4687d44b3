"""LongVILA's configuration files, both ways: VILA's config.json and those of its three folders.

VILA keeps a language model, a projector and a vision tower in folders of their own, each with a config.json. The one
at the top has the three again, or the names of the folders, as `llm_cfg`, `mm_projector_cfg` and `vision_tower_cfg`.
The folders' own count, as in VILA (`get_model_config` of llava/model/utils).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import need, reads_config_json
from tetrascope.models.layers.vit import ACTIVATIONS
from tetrascope.models.longvila.config import PROJECTORS, LongVilaConfig, LongVilaDecoder, LongVilaVision

PARTS = {"llm": "qwen2", "mm_projector": "v2l_projector", "vision_tower": "siglip_vision_model"}
"""Folder -> `model_type` of its config.json."""

IMAGE_TOKEN_ID = 151649
"""`<image>` in the tokenizers of VILA's Qwen2 models (llava/constants.py)."""

PAD_TOKEN_ID = 151643
"""`<|endoftext|>`, with which Qwen2's tokenizers pad."""

PLAIN_OPTIONS: dict[str, tuple[object, ...]] = {
    "image_aspect_ratio": ("resize", "square", None),
    "mm_vision_select_feature": ("cls_patch", None),
    "mm_use_im_start_end": (False, None),
    "s2": (False, None),
    "dynamic_s2": (False, None),
    "ps3": (False, None),
    "num_time_tokens": (0, None),
}
"""What the options at the top may say. `cls_patch` means all rows: SigLIP has no class token to leave out."""


@reads_config_json
def from_hf(raw: dict[str, Any]) -> LongVilaConfig:
    """From the contents of config.json, with those of the three folders' under `llm`, `mm_projector`, `vision_tower`.

    Without `image_token_id`, which is not VILA's, visual tokens have the id of `<image>` in VILA's tokenizers; in a
    vocabulary too small for it, that of the padding token, Qwen2's unless another is given. Raises UserError for
    another model's configuration and for options that would change what the model computes.
    """
    if raw.get("model_type") != "llava_llama":
        raise UserError(
            f"config.json: model_type is {raw.get('model_type')!r}; the family longvila needs 'llava_llama'"
        )
    from transformers import Qwen2Config, SiglipVisionConfig

    parts = {name: _part(raw, name) for name in PARTS}
    for field, known in PLAIN_OPTIONS.items():
        if raw.get(field) not in known:
            raise UserError(f"config.json: {field} is {raw[field]!r}; only {known[0]!r} is available")
    text: Any = Qwen2Config.from_dict(parts["llm"])
    projector = parts["mm_projector"].get("mm_projector_type")
    if projector not in PROJECTORS:
        raise UserError(
            f"config.json: mm_projector.mm_projector_type is {projector!r}; available are {', '.join(PROJECTORS)}"
        )
    vision = _vision(SiglipVisionConfig.from_dict(parts["vision_tower"]), raw.get("mm_vision_select_layer", -2))
    decoder = _decoder(text)
    for field, needed in (("mm_hidden_size", vision.width), ("hidden_size", decoder.hidden)):
        need(field, raw.get(field) or needed, needed)
    if raw.get("vision_resolution") not in (None, -1, vision.image):
        need("vision_resolution", raw["vision_resolution"], vision.image)
    eos = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    if eos is None:
        raise UserError("config.json: llm.eos_token_id is missing; add the id of <|im_end|>")
    usual = PAD_TOKEN_ID if decoder.vocab > PAD_TOKEN_ID else eos
    pad: int = usual if text.pad_token_id is None else text.pad_token_id
    return LongVilaConfig(
        decoder=decoder,
        vision=vision,
        image_token_id=raw.get("image_token_id", IMAGE_TOKEN_ID if decoder.vocab > IMAGE_TOKEN_ID else pad),
        eos_token_id=eos,
        pad_token_id=pad,
        projector=projector,
        token_order=raw.get("mm_token_order", "rows"),
        frames=raw.get("num_video_frames") or 8,
        initializer_range=text.initializer_range,
        max_positions=text.max_position_embeddings,
    )


def _part(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration of a folder: its own, or else the one in the config.json above."""
    found = raw.get(name, raw.get(f"{name}_cfg"))
    if not isinstance(found, dict):
        raise UserError(f"config.json: {name}_cfg is {found!r}, and {name}/config.json is missing; add that file")
    kind = found.get("model_type", PARTS[name])
    if kind != PARTS[name]:
        raise UserError(f"config.json: {name}.model_type is {kind!r}; the family longvila needs {PARTS[name]!r}")
    return found


def _decoder(text: Any) -> LongVilaDecoder:
    rope = text.rope_parameters
    need("llm.rope_parameters.rope_type", rope.get("rope_type"), "default")
    need("llm.rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    for field, needed in (("hidden_act", "silu"), ("use_sliding_window", False), ("attention_dropout", 0)):
        need(f"llm.{field}", getattr(text, field), needed)
    return LongVilaDecoder(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        rms_eps=text.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        tied_embeddings=text.tie_word_embeddings,
        head_dim=getattr(text, "head_dim", None) or 0,
    )


def _vision(siglip: Any, layer: object) -> LongVilaVision:
    """layer: index into the hidden states, of which there is one more than blocks; 0 is before the first."""
    need("vision_tower.attention_dropout", siglip.attention_dropout, 0)
    need("vision_tower.num_channels", siglip.num_channels, 3)
    if siglip.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"config.json: vision_tower.hidden_act is {siglip.hidden_act!r}; available are {', '.join(ACTIVATIONS)}"
        )
    states = siglip.num_hidden_layers + 1
    used = layer % states if isinstance(layer, int) and -states <= layer < states else 0
    if not used:
        raise UserError(
            f"config.json: mm_vision_select_layer is {layer!r}; only the output of one of the {states - 1} blocks is "
            "available, such as -2"
        )
    return LongVilaVision(
        width=siglip.hidden_size,
        layers=siglip.num_hidden_layers,
        heads=siglip.num_attention_heads,
        mlp=siglip.intermediate_size,
        image=siglip.image_size,
        patch=siglip.patch_size,
        used=used,
        activation=siglip.hidden_act,
        norm_eps=siglip.layer_norm_eps,
        pooling_head=siglip.vision_use_head,
    )


def to_hf(config: LongVilaConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json, with the image's token and the token order besides what VILA writes."""
    v = config.vision
    return {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "model_dtype": f"torch.{dtype}",
        "hidden_size": config.decoder.hidden,
        "image_aspect_ratio": "resize",
        "image_token_id": config.image_token_id,
        "llm_cfg": _llm(config, dtype),
        "mm_hidden_size": v.width,
        "mm_projector_cfg": _projector(config, dtype),
        "mm_token_order": config.token_order,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": v.used - v.layers - 1,
        "num_video_frames": config.frames,
        "s2": False,
        "vision_resolution": -1,
        "vision_tower_cfg": _siglip(config, dtype),
    }


def config_files(config: LongVilaConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """All four config.json, by path in the folder."""
    return {
        "config.json": to_hf(config, dtype),
        "llm/config.json": _llm(config, dtype),
        "mm_projector/config.json": _projector(config, dtype),
        "vision_tower/config.json": _siglip(config, dtype),
    }


def _llm(config: LongVilaConfig, dtype: str) -> dict[str, Any]:
    """In the form of transformers 4, which VILA needs; transformers 5 reads it too."""
    d = config.decoder
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": PARTS["llm"],
        "torch_dtype": dtype,
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": d.vocab,
        "rms_norm_eps": d.rms_eps,
        "rope_theta": d.rope_theta,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": d.tied_embeddings,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _projector(config: LongVilaConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["MultimodalProjector"],
        "model_type": PARTS["mm_projector"],
        "mm_projector_type": config.projector,
        "torch_dtype": dtype,
    }


def _siglip(config: LongVilaConfig, dtype: str) -> dict[str, Any]:
    v = config.vision
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": PARTS["vision_tower"],
        "torch_dtype": dtype,
        "hidden_size": v.width,
        "intermediate_size": v.mlp,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "image_size": v.image,
        "patch_size": v.patch,
        "num_channels": v.channels,
        "hidden_act": v.activation,
        "layer_norm_eps": v.norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": v.pooling_head,
    }
