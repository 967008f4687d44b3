"""Shapes of Qwen2.5-VL, and its config.json both ways."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import first_token, need, reads_config_json
from tetrascope.models.layers.mrope import RULES
from tetrascope.models.media import Media, VisionCost
from tetrascope.models.qwen2_5_vl.windows import window_lengths
from tetrascope.models.qwen2_vl.config import Qwen2VLDecoder
from tetrascope.models.shape_checks import check_heads, check_positive


@dataclass(frozen=True)
class Qwen2_5VLVision:
    """Vision encoder: `width` E, `intermediate` width of its MLPs, `patch` pixels, `merge` patches a side.

    window: side of an attention window in pixels. full_attention: the blocks that attend over whole frames; all others
    attend inside windows. tokens_per_second: temporal positions that a second of video spans.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    width: int
    layers: int
    heads: int
    intermediate: int
    full_attention: tuple[int, ...]
    window: int = 112
    tokens_per_second: int = 2
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    channels: int = 3

    @property
    def patch_width(self) -> int:
        """Numbers in a patch row, flattened in the order (channel, frame, row, column)."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def merged_width(self) -> int:
        return self.width * self.merge**2

    @property
    def window_side(self) -> int:
        """Merged patches on a window's side."""
        return self.window // (self.merge * self.patch)

    def cost(self, hidden: int) -> VisionCost:
        """Multiply-adds; `hidden` is the decoder's width."""
        full = len(self.full_attention)
        return VisionCost(
            patch=self.patch_width * self.width,
            linears=self.layers * (4 * self.width**2 + 3 * self.width * self.intermediate),
            attention=full * 2 * self.width,
            adaptor=self.merged_width * (self.merged_width + hidden),
            window_attention=(self.layers - full) * 2 * self.width,
        )


@dataclass(frozen=True)
class Qwen2_5VLConfig:
    """Qwen2.5-VL, with the decoder of Qwen2-VL.

    position_rule: `paper` or `hf` (transformers 5): where positions go on after a video, see layers/mrope.py.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: Qwen2VLDecoder
    vision: Qwen2_5VLVision
    mrope_section: tuple[int, int, int]
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int
    position_rule: str = "paper"
    initializer_range: float = 0.02
    max_positions: int = 128000

    @property
    def vision_cost(self) -> VisionCost:
        return self.vision.cost(self.decoder.hidden)

    @property
    def typical(self) -> Media:
        """A picture of 224 x 224 pixels."""
        return media("image", (1, 16, 16), self.vision)

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
        if v.window < v.merge * v.patch:
            raise UserError(
                f"model.config.vision.window: {v.window} pixels must hold a merged patch of {v.merge * v.patch} pixels"
            )
        blocks = v.full_attention
        if sorted(set(blocks)) != list(blocks) or any(not 0 <= block < v.layers for block in blocks):
            raise UserError(
                f"model.config.vision.full_attention: {list(blocks)} must be ascending numbers of the {v.layers} "
                "vision blocks, from 0"
            )
        if sum(self.mrope_section) * 2 != d.head_dim or min(self.mrope_section) < 0:
            raise UserError(
                f"model.config.mrope_section: {list(self.mrope_section)} must sum to half the head width, "
                f"{d.head_dim // 2}"
            )
        if self.position_rule not in RULES:
            raise UserError(f"model.config.position_rule: {self.position_rule!r} must be 'paper' or 'hf'")


def media(
    kind: Literal["image", "video"],
    grid: tuple[int, int, int],
    vision: Qwen2_5VLVision,
    step: Fraction = Fraction(0),
    **more: Any,
) -> Media:
    """An image or video of `grid` = (frames, patch rows, patch columns); a merge x merge block makes one token.

    step: seconds from one frame of the grid to the next; it follows in `Media.grid` as numerator and denominator,
    since temporal positions are rounded down: a seconds value that is off by rounding would be off by one position.
    """
    t, h, w = grid
    tokens = t * h * w // vision.merge**2
    return Media(
        kind,
        grid=(t, h, w, step.numerator, step.denominator),
        frames=(h * w,) * t,
        features=tokens,
        tokens=tokens,
        windows=window_lengths(h // vision.merge, w // vision.merge, vision.window_side, vision.merge**2) * t,
        **more,
    )


@reads_config_json
def from_hf(raw: dict[str, Any]) -> Qwen2_5VLConfig:
    """From the contents of config.json, in the flat (4.x) or the nested (5.x) form; transformers reads both.

    Raises UserError for another model's configuration and for options that would change what the model computes.
    """
    from transformers import Qwen2_5_VLConfig as HFConfig

    if raw.get("model_type") != "qwen2_5_vl":
        raise UserError(
            f"config.json: model_type is {raw.get('model_type')!r}; the family qwen2_5_vl needs 'qwen2_5_vl'"
        )
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
        ("vision_config.hidden_act", vision.hidden_act, "silu"),
        ("vision_config.out_hidden_size", vision.out_hidden_size, text.hidden_size),
        ("vision_config.rope_parameters", vision.rope_parameters, {"rope_type": "axial", "rope_theta": 10000.0}),
    ):
        need(what, found, needed)
    for field in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, field), int):
            raise UserError(f"config.json: vision_config.{field} is {getattr(vision, field)!r}; give one whole number")
    return Qwen2_5VLConfig(
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
        vision=Qwen2_5VLVision(
            width=vision.hidden_size,
            layers=vision.depth,
            heads=vision.num_heads,
            intermediate=vision.intermediate_size,
            full_attention=tuple(vision.fullatt_block_indexes),
            window=vision.window_size,
            tokens_per_second=vision.tokens_per_second,
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


def to_hf(config: Qwen2_5VLConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json, in the nested form that transformers 5 writes."""
    d, v = config.decoder, config.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": dtype,
        "tie_word_embeddings": d.tied_embeddings,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
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
            "model_type": "qwen2_5_vl_vision",
            "depth": v.layers,
            "hidden_size": v.width,
            "intermediate_size": v.intermediate,
            "num_heads": v.heads,
            "in_channels": v.channels,
            "patch_size": v.patch,
            "spatial_merge_size": v.merge,
            "temporal_patch_size": v.temporal_patch,
            "tokens_per_second": v.tokens_per_second,
            "window_size": v.window,
            "fullatt_block_indexes": list(v.full_attention),
            "out_hidden_size": d.hidden,
            "hidden_act": "silu",
        },
    }


def _preset(decoder: tuple[int, int, int, int, int, int], tied: bool = False, intermediate: int = 3420) -> Any:
    return lambda: Qwen2_5VLConfig(
        decoder=Qwen2VLDecoder(*decoder, tied_embeddings=tied),
        vision=Qwen2_5VLVision(
            width=1280, layers=32, heads=16, intermediate=intermediate, full_attention=(7, 15, 23, 31)
        ),
        mrope_section=(16, 24, 24),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        eos_token_id=151645,
        pad_token_id=151643,
    )


PRESETS = {
    "3b": _preset((2048, 11008, 36, 16, 2, 151936), tied=True),
    "7b": _preset((3584, 18944, 28, 28, 4, 152064)),
    "72b": _preset((8192, 29568, 80, 64, 8, 152064), intermediate=3456),
}
"""The published sizes (config.json of Qwen/Qwen2.5-VL-*-Instruct)."""
