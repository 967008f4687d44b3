"""Shapes of Qwen3-VL's dense models, and their config.json both ways."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import first_token, need, reads_config_json
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.media import Media, VisionCost
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.shape_checks import check_positive


@dataclass(frozen=True)
class Qwen3VLVision:
    """Vision encoder: `width` E, `mlp` the hidden width of its MLPs, `patch` pixels, `merge` patches a side.

    deepstack: the blocks, counted from 0, after which features are taken for the decoder's first layers.
    table_side: rows and columns of the learned position table.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    width: int
    layers: int
    heads: int
    mlp: int
    deepstack: tuple[int, ...]
    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    channels: int = 3
    table_side: int = 48

    @property
    def patch_width(self) -> int:
        """Numbers in a patch row, flattened in the order (channel, frame, row, column)."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def merged_width(self) -> int:
        return self.width * self.merge**2

    def cost(self, hidden: int) -> VisionCost:
        """Multiply-adds; `hidden` is the decoder's width. A feature goes through every merger."""
        return VisionCost(
            patch=self.patch_width * self.width,
            linears=self.layers * (4 * self.width**2 + 2 * self.width * self.mlp),
            attention=self.layers * 2 * self.width,
            adaptor=(1 + len(self.deepstack)) * self.merged_width * (self.merged_width + hidden),
        )


@dataclass(frozen=True)
class Qwen3VLDecoder(DecoderShape):
    """The Qwen3 decoder: norms on query and key heads, no biases, defaults of the published checkpoints."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rms_eps: float = 1e-6
    rope_theta: float = 5e6
    qkv_bias: bool = False
    tied_embeddings: bool = False
    qk_norm: bool = True


@dataclass(frozen=True)
class Qwen3VLConfig:
    """Qwen3-VL. mrope_section: how many frequencies take the time, the height and the width, see model.py."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: Qwen3VLDecoder
    vision: Qwen3VLVision
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    initializer_range: float = 0.02
    max_positions: int = 262144

    @property
    def vision_cost(self) -> VisionCost:
        return self.vision.cost(self.decoder.hidden)

    @property
    def typical(self) -> Media:
        """A picture of 256 x 256 pixels."""
        return media("image", (1, 16, 16), self.vision.merge)

    def __post_init__(self) -> None:
        d, v = self.decoder, self.vision
        check_positive("decoder", d)
        check_positive("vision", v)
        if d.head_dim % 2:
            raise UserError(f"model.config.decoder.head_dim: {d.head_dim} must be even")
        if d.heads % d.kv_heads:
            raise UserError(f"model.config.decoder: heads {d.heads} must be a multiple of kv_heads {d.kv_heads}")
        if d.qkv_bias or not d.qk_norm:
            raise UserError("model.config.decoder: Qwen3 has qk_norm and no qkv_bias; leave both out")
        if v.width % (4 * v.heads):
            raise UserError(
                f"model.config.vision: width {v.width} must be a multiple of 4 x heads {v.heads}: "
                "2D rotary positions need head widths that are multiples of 4"
            )
        if list(v.deepstack) != sorted(set(v.deepstack) & set(range(v.layers))):
            raise UserError(
                f"model.config.vision.deepstack: {list(v.deepstack)} must be ascending numbers of the blocks "
                f"0 to {v.layers - 1}"
            )
        if len(v.deepstack) > d.layers:
            raise UserError(
                f"model.config.vision.deepstack: {len(v.deepstack)} features need as many decoder layers, "
                f"the model has {d.layers}"
            )
        if sum(self.mrope_section) * 2 != d.head_dim or min(self.mrope_section) < 0:
            raise UserError(
                f"model.config.mrope_section: {list(self.mrope_section)} must sum to half the head width, "
                f"{d.head_dim // 2}"
            )


@reads_config_json
def from_hf(raw: dict[str, Any]) -> Qwen3VLConfig:
    """From the contents of config.json, as transformers 4.57 or 5 wrote it.

    Raises UserError for another model's configuration and for options that would change what the model computes.
    """
    from transformers import Qwen3VLConfig as HFConfig

    if raw.get("model_type") != "qwen3_vl":
        raise UserError(f"config.json: model_type is {raw.get('model_type')!r}; the family qwen3_vl needs 'qwen3_vl'")
    hf = HFConfig.from_dict(copy.deepcopy(raw))  # it corrects the old name of the vision part in place
    text: Any = hf.text_config
    vision: Any = hf.vision_config
    rope = text.rope_parameters
    side = math.isqrt(vision.num_position_embeddings)
    for what, found, needed in (
        ("text_config.rope_parameters.rope_type", rope.get("rope_type"), "default"),
        ("text_config.rope_parameters.mrope_interleaved", rope.get("mrope_interleaved", True), True),
        ("text_config.hidden_act", text.hidden_act, "silu"),
        ("text_config.attention_bias", text.attention_bias, False),
        ("text_config.attention_dropout", text.attention_dropout, 0),
        ("vision_config.hidden_act", vision.hidden_act, "gelu_pytorch_tanh"),
        ("vision_config.rope_parameters.rope_theta", vision.rope_parameters["rope_theta"], 10000),
        ("vision_config.out_hidden_size", vision.out_hidden_size, text.hidden_size),
        ("vision_config.num_position_embeddings", vision.num_position_embeddings, side**2),
    ):
        need(what, found, needed)
    return Qwen3VLConfig(
        decoder=Qwen3VLDecoder(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            vocab=text.vocab_size,
            head_dim=text.head_dim,
            rms_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            tied_embeddings=bool(
                hf.tie_word_embeddings or raw.get("text_config", {}).get("tie_word_embeddings", False)
            ),
        ),
        vision=Qwen3VLVision(
            width=vision.hidden_size,
            layers=vision.depth,
            heads=vision.num_heads,
            mlp=vision.intermediate_size,
            deepstack=tuple(vision.deepstack_visual_indexes),
            patch=vision.patch_size,
            temporal_patch=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            channels=vision.in_channels,
            table_side=side,
        ),
        mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
        image_token_id=hf.image_token_id,
        video_token_id=hf.video_token_id,
        vision_start_token_id=hf.vision_start_token_id,
        vision_end_token_id=hf.vision_end_token_id,
        eos_token_id=first_token(text.eos_token_id, 151645),
        pad_token_id=first_token(text.pad_token_id, 151643),
        initializer_range=text.initializer_range,
        max_positions=text.max_position_embeddings,
    )


def to_hf(config: Qwen3VLConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json, in the form that transformers 5 writes."""
    d, v = config.decoder, config.vision
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": dtype,
        "tie_word_embeddings": d.tied_embeddings,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": dtype,
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
            "max_position_embeddings": config.max_positions,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": d.tied_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": d.rope_theta,
                "mrope_section": list(config.mrope_section),
                "mrope_interleaved": True,
            },
            "bos_token_id": config.pad_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": v.layers,
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            "num_heads": v.heads,
            "out_hidden_size": d.hidden,
            "deepstack_visual_indexes": list(v.deepstack),
            "num_position_embeddings": v.table_side**2,
            "in_channels": v.channels,
            "patch_size": v.patch,
            "spatial_merge_size": v.merge,
            "temporal_patch_size": v.temporal_patch,
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": config.initializer_range,
        },
    }


_SMALL_VISION = Qwen3VLVision(width=1024, layers=24, heads=16, mlp=4096, deepstack=(5, 11, 17))
_LARGE_VISION = Qwen3VLVision(width=1152, layers=27, heads=16, mlp=4304, deepstack=(8, 16, 24))


def _preset(
    hidden: int, intermediate: int, layers: int, heads: int, tied: bool, vision: Qwen3VLVision = _LARGE_VISION
) -> Any:
    return lambda: Qwen3VLConfig(
        decoder=Qwen3VLDecoder(
            hidden, intermediate, layers, heads, kv_heads=8, vocab=151936, tied_embeddings=tied, head_dim=128
        ),
        vision=vision,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        eos_token_id=151645,
        pad_token_id=151643,
    )


PRESETS = {
    "2b": _preset(2048, 6144, 28, 16, tied=True, vision=_SMALL_VISION),
    "4b": _preset(2560, 9728, 36, 32, tied=True, vision=_SMALL_VISION),
    "8b": _preset(4096, 12288, 36, 32, tied=False),
    "32b": _preset(5120, 25600, 64, 64, tied=False),
}
"""The published dense sizes (config.json of Qwen/Qwen3-VL-*-Instruct)."""
