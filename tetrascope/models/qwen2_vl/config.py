"""Shapes of Qwen2-VL, and its config.json both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import first_token, need, reads_config_json, special_token
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.media import Media, VisionCost
from tetrascope.models.shape_checks import check_heads, check_positive


@dataclass(frozen=True)
class Qwen2VLVision:
    """Vision encoder: `width` E, `mlp_ratio` of its MLPs' hidden width to E, `patch` pixels, `merge` patches a side."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    width: int
    layers: int
    heads: int
    mlp_ratio: int = 4
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    channels: int = 3

    @property
    def mlp(self) -> int:
        return self.width * self.mlp_ratio

    @property
    def patch_width(self) -> int:
        """Numbers in a patch row, flattened in the order (channel, frame, row, column)."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def merged_width(self) -> int:
        return self.width * self.merge**2

    def cost(self, hidden: int) -> VisionCost:
        """Multiply-adds; `hidden` is the decoder's width."""
        return VisionCost(
            patch=self.patch_width * self.width,
            linears=self.layers * (4 * self.width**2 + 2 * self.width * self.mlp),
            attention=self.layers * 2 * self.width,
            adaptor=self.merged_width * (self.merged_width + hidden),
        )


@dataclass(frozen=True)
class Qwen2VLDecoder(DecoderShape):
    """The Qwen2 decoder: biases on query, key and value, defaults of the published checkpoints."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True
    tied_embeddings: bool = False


@dataclass(frozen=True)
class Qwen2VLConfig:
    """Qwen2-VL. `position_rule`: `paper` (and Megatron ports) or `hf` (transformers 5), see positions.py."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: Qwen2VLDecoder
    vision: Qwen2VLVision
    mrope_section: tuple[int, int, int]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int
    position_rule: str = "paper"
    initializer_range: float = 0.02
    max_positions: int = 32768

    @property
    def vision_cost(self) -> VisionCost:
        return self.vision.cost(self.decoder.hidden)

    @property
    def typical(self) -> Media:
        """A picture of 224 x 224 pixels."""
        return media("image", (1, 16, 16), self.vision.merge)

    def __post_init__(self) -> None:
        d, v = self.decoder, self.vision
        check_positive("decoder", d)
        check_positive("vision", v)
        check_heads(d)
        if v.width % (4 * v.heads):
            raise UserError(
                f"model.config.vision: width {v.width} must be a multiple of 4 x heads {v.heads}: "
                "2D rotary positions need head widths that are multiples of 4"
            )
        if sum(self.mrope_section) * 2 != d.head_dim or min(self.mrope_section) < 0:
            raise UserError(
                f"model.config.mrope_section: {list(self.mrope_section)} must sum to half the head width, "
                f"{d.head_dim // 2}"
            )
        if self.position_rule not in ("paper", "hf"):
            raise UserError(f"model.config.position_rule: {self.position_rule!r} must be 'paper' or 'hf'")


def media(kind: Literal["image", "video"], grid: tuple[int, int, int], merge: int, **more: Any) -> Media:
    """An image or video of `grid` = (frames, patch rows, patch columns); a merge x merge block makes one token."""
    t, h, w = grid
    tokens = t * h * w // merge**2
    return Media(kind, grid, (h * w,) * t, tokens, tokens, **more)


SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
}


def complete(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Fills `decoder.vocab` and the special token ids that the configuration leaves out, from the tokenizer.

    Raises UserError when the tokenizer lacks one of Qwen2-VL's special tokens.
    """
    filled = dict(config)
    for field, token in SPECIAL_TOKENS.items():
        if field not in filled:
            filled[field] = special_token(tokenizer, token)
    if isinstance(filled.get("decoder"), dict):
        filled["decoder"] = {"vocab": len(tokenizer), **filled["decoder"]}
    return filled


@reads_config_json
def from_hf(raw: dict[str, Any]) -> Qwen2VLConfig:
    """From the contents of config.json, in the flat (4.x) or the nested (5.x) form; transformers reads both.

    Raises UserError for another model's configuration and for options that would change what the model computes.
    """
    from transformers import Qwen2VLConfig as HFConfig

    if raw.get("model_type") != "qwen2_vl":
        raise UserError(f"config.json: model_type is {raw.get('model_type')!r}; the family qwen2_vl needs 'qwen2_vl'")
    hf = HFConfig.from_dict(raw)
    text: Any = hf.text_config
    vision: Any = hf.vision_config
    rope = text.rope_parameters
    if rope.get("rope_type") not in ("default", "mrope") or "mrope_section" not in rope:
        raise UserError(f"config.json: rope parameters {rope} must be of type default or mrope, with an mrope_section")
    if text.use_sliding_window:
        raise UserError("config.json: use_sliding_window is true; only full attention is available, set it to false")
    for what, found, needed in (
        ("text_config.hidden_act", text.hidden_act, "silu"),
        ("text_config.attention_dropout", text.attention_dropout, 0),
        ("vision_config.hidden_act", vision.hidden_act, "quick_gelu"),
    ):
        need(what, found, needed)
    return Qwen2VLConfig(
        max_positions=text.max_position_embeddings,
        decoder=Qwen2VLDecoder(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            vocab=text.vocab_size,
            rms_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            tied_embeddings=bool(
                hf.tie_word_embeddings or raw.get("text_config", {}).get("tie_word_embeddings", False)
            ),
        ),
        vision=Qwen2VLVision(
            width=vision.embed_dim,
            layers=vision.depth,
            heads=vision.num_heads,
            mlp_ratio=vision.mlp_ratio,
            patch=vision.patch_size,
            temporal_patch=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            channels=vision.in_channels,
        ),
        mrope_section=tuple(rope["mrope_section"]),
        image_token_id=hf.image_token_id,
        video_token_id=hf.video_token_id,
        vision_start_token_id=hf.vision_start_token_id,
        vision_end_token_id=hf.vision_end_token_id,
        eos_token_id=first_token(text.eos_token_id, 151645),
        pad_token_id=first_token(text.pad_token_id, 151643),
        initializer_range=text.initializer_range,
    )


def to_hf(config: Qwen2VLConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json, in the nested form that transformers 5 writes."""
    d, v = config.decoder, config.vision
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "dtype": dtype,
        "tie_word_embeddings": d.tied_embeddings,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": {
            "model_type": "qwen2_vl_text",
            "dtype": dtype,
            "hidden_size": d.hidden,
            "intermediate_size": d.intermediate,
            "num_hidden_layers": d.layers,
            "num_attention_heads": d.heads,
            "num_key_value_heads": d.kv_heads,
            "vocab_size": d.vocab,
            "rms_norm_eps": d.rms_eps,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "initializer_range": config.initializer_range,
            "use_sliding_window": False,
            "tie_word_embeddings": d.tied_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": d.rope_theta,
                "mrope_section": list(config.mrope_section),
            },
            "bos_token_id": config.pad_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": v.layers,
            "embed_dim": v.width,
            "hidden_size": d.hidden,
            "mlp_ratio": v.mlp_ratio,
            "num_heads": v.heads,
            "in_channels": v.channels,
            "patch_size": v.patch,
            "spatial_merge_size": v.merge,
            "temporal_patch_size": v.temporal_patch,
            "hidden_act": "quick_gelu",
        },
    }


def _preset(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Any:
    return lambda: Qwen2VLConfig(
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


PRESETS = {
    "2b": _preset(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7b": _preset(3584, 18944, 28, 28, 4, 152064, tied=False),
    "72b": _preset(8192, 29568, 80, 64, 8, 152064, tied=False),
}
"""The published sizes (config.json of Qwen/Qwen2-VL-*-Instruct)."""
