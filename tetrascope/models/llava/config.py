"""Shapes of LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tetrascope.errors import UserError
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.media import Media, VisionCost
from tetrascope.models.shape_checks import check_heads, check_positive, check_vit


@dataclass(frozen=True)
class LlavaVision(ViTShape):
    """CLIP, of which LLaVA takes the hidden states before the last block. `used` 0: all blocks but one."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    post_norm: bool = True

    def __post_init__(self) -> None:
        if not self.used:
            object.__setattr__(self, "used", self.layers - 1)


@dataclass(frozen=True)
class LlavaDecoder(DecoderShape):
    """The Llama decoder: no biases, defaults of Vicuna-1.5."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rms_eps: float = 1e-5
    rope_theta: float = 1e4
    qkv_bias: bool = False
    tied_embeddings: bool = False


@dataclass(frozen=True)
class LlavaConfig:
    """LLaVA-1.5. aspect: how a picture becomes square, `crop` or `pad` (preprocess.py). positions: V2PE's switch.

    max_positions: stated in config.json, for other programs. max_tokens of the data is what bounds a sample.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: LlavaDecoder
    vision: LlavaVision
    image_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    aspect: str = "crop"
    positions: PositionRule = PositionRule()
    initializer_range: float = 0.02
    max_positions: int = 4096

    @property
    def vision_cost(self) -> VisionCost:
        """Multiply-adds of encoder and projector."""
        v, hidden = self.vision, self.decoder.hidden
        return VisionCost(
            patch=v.patch_width * v.width,
            linears=v.linears,
            attention=v.attention,
            adaptor=v.width * hidden + hidden**2,
        )

    @property
    def typical(self) -> Media:
        """Any picture: all cost the same."""
        return media(self.vision, (self.vision.image, self.vision.image))

    def __post_init__(self) -> None:
        d, v = self.decoder, self.vision
        for section, shape in (("decoder", d), ("vision", v)):
            check_positive(section, shape)
            fixed = LLAMA if section == "decoder" else CLIP
            for field, needed in fixed.items():
                if getattr(shape, field) != needed:
                    raise UserError(f"model.config.{section}.{field}: must be {needed} in LLaVA-1.5; remove it")
        check_heads(d, own_width=True)
        check_vit(v)
        if v.image % v.patch:
            raise UserError(f"model.config.vision: image {v.image} must be a multiple of patch {v.patch}")
        if self.aspect not in ("crop", "pad"):
            raise UserError(f"model.config.aspect: {self.aspect!r} must be 'crop' or 'pad'")


CLIP = {
    "channels": 3,
    "class_token": True,
    "pre_norm": True,
    "layer_scale": False,
    "patch_bias": False,
    "post_norm": True,
}
"""What CLIP is by definition: no field of its config.json says otherwise."""

LLAMA = {"qkv_bias": False, "qk_norm": False}
"""The same of the decoder."""


def media(vision: ViTShape, size: tuple[int, int]) -> Media:
    """An image: one square view. Its class token has a feature too, and no decoder token."""
    return Media("image", (1, 1), (vision.rows,), vision.rows, vision.side**2, size=size)


def complete(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Fills `decoder.vocab` and the special token ids that the configuration leaves out, from the tokenizer.

    Raises UserError when the tokenizer lacks `<image>`, a beginning or an end of text.
    """
    unknown = tokenizer.unk_token_id
    image = tokenizer.convert_tokens_to_ids("<image>")
    pad = unknown if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos = tokenizer.eos_token_id
    found = {
        "image_token_id": ("<image>", None if image == unknown else image),
        "bos_token_id": ("bos_token", tokenizer.bos_token_id),
        "eos_token_id": ("eos_token", eos),
        "pad_token_id": ("pad_token", eos if pad is None else pad),
    }
    filled = dict(config)
    for field, (token, index) in found.items():
        if field not in filled:
            if index is None:
                raise UserError(f"data.tokenizer: has no {token}, which LLaVA needs; add it as a special token")
            filled[field] = index
    if isinstance(filled.get("decoder"), dict):
        filled["decoder"] = {"vocab": len(tokenizer), **filled["decoder"]}
    return filled


def _preset(hidden: int, intermediate: int, layers: int, heads: int) -> Callable[[], LlavaConfig]:
    return lambda: LlavaConfig(
        decoder=LlavaDecoder(hidden, intermediate, layers, heads, kv_heads=heads, vocab=32064),
        vision=LlavaVision(width=1024, layers=24, heads=16, mlp=4096, image=336),
        image_token_id=32000,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=32001,
    )


PRESETS = {"7b": _preset(4096, 11008, 32, 32), "13b": _preset(5120, 13824, 40, 40)}
"""The published sizes (config.json of llava-hf/llava-1.5-*-hf), vocabulary padded to 32064 as there."""
