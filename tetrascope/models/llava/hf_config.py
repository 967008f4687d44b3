"""LLaVA-1.5's config.json, both ways: transformers' (`LlavaConfig`) and the original repository's (flat)."""

from __future__ import annotations

from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import first_token, need, reads_config_json
from tetrascope.models.layers.vit import ACTIVATIONS
from tetrascope.models.llava.config import LlavaConfig, LlavaDecoder, LlavaVision

TOWERS = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}
"""`mm_vision_tower` of the original without its owner -> side of the pictures; all of them ViT-L."""

UNKNOWN_TOKEN = 0
"""`<unk>` of Llama's vocabulary, which no text contains."""


@reads_config_json
def from_hf(raw: dict[str, Any]) -> LlavaConfig:
    """From the contents of config.json: transformers' nested form, or the original repository's flat one.

    The original's vocabulary has no token for images (its data loader writes −200 in the ids): `<unk>` stands for them.
    Raises UserError for another model's configuration and for options that would change what the model computes.
    """
    if raw.get("model_type") not in ("llava", "llava_llama"):
        raise UserError(f"config.json: model_type is {raw.get('model_type')!r}; the family llava needs 'llava'")
    if "mm_vision_tower" in raw or raw["model_type"] == "llava_llama":
        return _from_original(raw)
    from transformers import LlavaConfig as HFConfig

    for section, needed in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        found = (raw.get(section) or {}).get("model_type", needed)
        if found != needed:
            raise UserError(f"config.json: {section}.model_type is {found!r}; the family llava needs {needed!r}")
    hf: Any = HFConfig.from_dict(raw)
    need("projector_hidden_act", hf.projector_hidden_act, "gelu")
    need("multimodal_projector_bias", hf.multimodal_projector_bias, True)
    need("vision_feature_select_strategy", hf.vision_feature_select_strategy, "default")
    return LlavaConfig(
        decoder=_decoder(hf.text_config, "text_config.", hf.tie_word_embeddings),
        vision=_vision(hf.vision_config, "vision_feature_layer", hf.vision_feature_layer),
        image_token_id=hf.image_token_index,
        bos_token_id=first_token(hf.text_config.bos_token_id, 1),
        eos_token_id=first_token(hf.text_config.eos_token_id, 2),
        pad_token_id=first_token(raw.get("pad_token_id", hf.text_config.pad_token_id), UNKNOWN_TOKEN),
        aspect=_aspect(raw),
        initializer_range=hf.text_config.initializer_range,
        max_positions=hf.text_config.max_position_embeddings,
    )


def _from_original(raw: dict[str, Any]) -> LlavaConfig:
    """The original's config.json says which CLIP it needs by name; ours adds its shape as `vision_config`."""
    from transformers import CLIPVisionConfig, LlamaConfig

    text: Any = LlamaConfig.from_dict({**raw, "model_type": "llama"})
    need("mm_projector_type", raw.get("mm_projector_type"), "mlp2x_gelu")
    need("mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), "patch")
    need("mm_use_im_start_end", raw.get("mm_use_im_start_end", False), False)
    need("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat"), "flat")
    shape = raw.get("vision_config")
    if shape is None:
        tower = str(raw.get("mm_vision_tower"))
        side = TOWERS.get(tower.rstrip("/").rpartition("/")[2])
        if side is None:
            raise UserError(
                f"config.json: mm_vision_tower is {tower!r}, which is none of {', '.join(TOWERS)}; "
                "add its shape as vision_config"
            )
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        shape |= {"image_size": side, "patch_size": 14}
    vision = _vision(CLIPVisionConfig.from_dict(shape), "mm_vision_select_layer", raw.get("mm_vision_select_layer", -2))
    need("mm_hidden_size", raw.get("mm_hidden_size", vision.width), vision.width)
    return LlavaConfig(
        decoder=_decoder(text, "", text.tie_word_embeddings),
        vision=vision,
        image_token_id=raw.get("image_token_index", UNKNOWN_TOKEN),
        bos_token_id=first_token(text.bos_token_id, 1),
        eos_token_id=first_token(text.eos_token_id, 2),
        pad_token_id=first_token(text.pad_token_id, UNKNOWN_TOKEN),
        aspect=_aspect(raw),
        initializer_range=text.initializer_range,
        max_positions=text.max_position_embeddings,
    )


def _decoder(text: Any, where: str, tied: bool) -> LlavaDecoder:
    rope = text.rope_parameters
    need(f"{where}rope_parameters.rope_type", rope.get("rope_type"), "default")
    need(f"{where}rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    for field, needed in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("attention_dropout", 0),
    ):
        need(f"{where}{field}", getattr(text, field), needed)
    return LlavaDecoder(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        rms_eps=text.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        tied_embeddings=tied,
        head_dim=text.head_dim,
    )


def _vision(clip: Any, field: str, layer: object) -> LlavaVision:
    """layer: index into CLIP's hidden states, of which there is one more than blocks; 0 is before the first."""
    need("vision_config.attention_dropout", clip.attention_dropout, 0)
    need("vision_config.num_channels", clip.num_channels, 3)
    if clip.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"config.json: vision_config.hidden_act is {clip.hidden_act!r}; available are {', '.join(ACTIVATIONS)}"
        )
    states = clip.num_hidden_layers + 1
    used = layer % states if isinstance(layer, int) and -states <= layer < states else 0
    if not used:
        raise UserError(
            f"config.json: {field} is {layer!r}; only the output of one of the {states - 1} blocks is available, "
            "such as -2"
        )
    return LlavaVision(
        width=clip.hidden_size,
        layers=clip.num_hidden_layers,
        heads=clip.num_attention_heads,
        mlp=clip.intermediate_size,
        image=clip.image_size,
        patch=clip.patch_size,
        used=used,
        activation=clip.hidden_act,
        norm_eps=clip.layer_norm_eps,
    )


def _aspect(raw: dict[str, Any]) -> str:
    """`image_aspect_ratio` of the original; transformers has it in its preprocessor's configuration instead."""
    ratio = raw.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad"):
        raise UserError(f"config.json: image_aspect_ratio is {ratio!r}; LLaVA-1.5 knows 'square' (cut) and 'pad'")
    return "pad" if ratio == "pad" else "crop"


def to_hf(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json in the form that transformers 5 writes."""
    v = config.vision
    rope = {"rope_type": "default", "rope_theta": config.decoder.rope_theta}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "tie_word_embeddings": config.decoder.tied_embeddings,
        "image_token_index": config.image_token_id,
        "image_seq_length": v.side**2,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": v.used - v.layers - 1,
        "vision_feature_select_strategy": "default",
        **_square(config),
        "text_config": {"model_type": "llama", "dtype": dtype, **_text(config), "rope_parameters": rope},
        "vision_config": {"model_type": "clip_vision_model", "dtype": dtype, **_clip(config)},
    }


def to_original(config: LlavaConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json as the original repository writes it, with CLIP's shape and the image's token."""
    v = config.vision
    names = [tower for tower, side in TOWERS.items() if side == v.image]
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "mm_hidden_size": v.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": v.used - v.layers - 1,
        "mm_vision_tower": f"openai/{(names or list(TOWERS))[0]}",
        **_square(config),
        **_text(config),
        "rope_theta": config.decoder.rope_theta,
        "vision_config": _clip(config),
    }


def _square(config: LlavaConfig) -> dict[str, str]:
    return {"image_aspect_ratio": "pad"} if config.aspect == "pad" else {}


def _text(config: LlavaConfig) -> dict[str, Any]:
    d = config.decoder
    return {
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": d.vocab,
        "rms_norm_eps": d.rms_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": d.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _clip(config: LlavaConfig) -> dict[str, Any]:
    v = config.vision
    return {
        "hidden_size": v.width,
        "intermediate_size": v.mlp,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "image_size": v.image,
        "patch_size": v.patch,
        "num_channels": v.channels,
        "hidden_act": v.activation,
        "layer_norm_eps": v.norm_eps,
        "projection_dim": 768,
    }
