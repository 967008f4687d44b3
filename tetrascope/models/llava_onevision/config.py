"""Shapes and choices of LLaVA-OneVision, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import special_token
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.llava_onevision.views import anyres_media
from tetrascope.models.media import Media, VisionCost
from tetrascope.models.shape_checks import check_heads, check_positive, check_vit

PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
"""Canvases (height, width) of the published checkpoints: every grid of 1 to 6 by 1 to 6 crops."""


@dataclass(frozen=True)
class LlavaOneVisionDecoder(DecoderShape):
    """The Qwen2 decoder: biases on query, key and value, defaults of the published checkpoints."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True
    tied_embeddings: bool = False


SIGLIP = ViTShape(width=1152, layers=26, heads=16, mlp=4304, image=384, activation="gelu_pytorch_tanh", post_norm=True)
"""SigLIP so400m-patch14-384 without its last block: 26 blocks, whose output is taken before the final norm."""


@dataclass(frozen=True)
class LlavaOneVisionConfig:
    """LLaVA-OneVision.

    pinpoints: canvases (height, width) for the crops of an image. max_views: a map of crops larger than this many
    views is shrunk to that (the N of `anyres_max_N`). single_image: what the only image of a sample becomes: `anyres`,
    or `square`, one view of the stretched image without a newline (the original's first stage). multi_image: what each
    of several becomes: `padded`, one view of the image padded to a square, then a newline (the original, and
    transformers where a sample's images are given as a list of their own), or `anyres` (transformers where they are
    given flat). positions: how far apart visual tokens are.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: LlavaOneVisionDecoder
    image_token_id: int
    video_token_id: int
    eos_token_id: int
    pad_token_id: int
    vision: ViTShape = SIGLIP
    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
    max_views: int = 9
    single_image: str = "anyres"
    multi_image: str = "padded"
    positions: PositionRule = dataclasses.field(default_factory=PositionRule)
    initializer_range: float = 0.02
    max_positions: int = 32768

    @property
    def vision_cost(self) -> VisionCost:
        v, hidden = self.vision, self.decoder.hidden
        return VisionCost(
            patch=v.patch_width * v.width,
            linears=v.linears,
            attention=v.attention,
            adaptor=hidden * (v.width + hidden),
        )

    @property
    def typical(self) -> Media:
        """A picture of twice by twice the encoder's input."""
        side = 2 * self.vision.image
        height, width = min(self.pinpoints, key=lambda canvas: abs(canvas[0] - side) + abs(canvas[1] - side))
        return anyres_media(self.vision, self.pinpoints, self.max_views, width, height)

    def __post_init__(self) -> None:
        d, v = self.decoder, self.vision
        check_positive("decoder", d)
        check_positive("vision", v)
        check_heads(d)
        check_vit(v)
        if v.patch > v.image:
            raise UserError(f"model.config.vision.patch: {v.patch} is more than image {v.image}")
        for field in ("class_token", "pre_norm", "layer_scale"):
            if getattr(v, field):
                raise UserError(f"model.config.vision.{field}: SigLIP has none; set it to false")
        if not v.patch_bias:
            raise UserError("model.config.vision.patch_bias: SigLIP has one; set it to true")
        if self.max_views < 1:
            raise UserError(f"model.config.max_views: {self.max_views} must be at least 1")
        if not self.pinpoints:
            raise UserError("model.config.pinpoints: empty; give at least one (height, width)")
        for canvas in self.pinpoints:
            if min(canvas) < 1 or any(length % v.image for length in canvas):
                raise UserError(f"model.config.pinpoints: {list(canvas)} must be multiples of vision.image {v.image}")
        for field, known in (("single_image", ("anyres", "square")), ("multi_image", ("padded", "anyres"))):
            if getattr(self, field) not in known:
                raise UserError(
                    f"model.config.{field}: {getattr(self, field)!r} must be {' or '.join(map(repr, known))}"
                )


SPECIAL_TOKENS = {
    "image_token_id": "<image>",
    "video_token_id": "<video>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
}


def complete(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Fills `decoder.vocab` and the special token ids that the configuration leaves out, from the tokenizer.

    Raises UserError when the tokenizer lacks one of LLaVA-OneVision's special tokens.
    """
    filled = dict(config)
    for field, token in SPECIAL_TOKENS.items():
        if field not in filled:
            filled[field] = token_id(tokenizer, token)
    if isinstance(filled.get("decoder"), dict):
        filled["decoder"] = {"vocab": len(tokenizer), **filled["decoder"]}
    return filled


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a special token. Raises UserError when the tokenizer has no such token."""
    hint = " (to a Qwen2 tokenizer first <image>, then <video>: they get the ids of the published checkpoints)"
    return special_token(tokenizer, token, "LLaVA-OneVision", hint)


def _preset(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> Callable[[], LlavaOneVisionConfig]:
    return lambda: LlavaOneVisionConfig(
        decoder=LlavaOneVisionDecoder(hidden, intermediate, layers, heads, kv_heads, vocab, tied_embeddings=tied),
        image_token_id=151646,
        video_token_id=151647,
        eos_token_id=151645,
        pad_token_id=151643,
    )


PRESETS = {
    "0.5b": _preset(896, 4864, 24, 14, 2, 152000, tied=True),
    "7b": _preset(3584, 18944, 28, 28, 4, 152128),
    "72b": _preset(8192, 29568, 80, 64, 8, 152128),
}
"""The published sizes: Qwen2's config.json, with the vocabulary that transformers' conversion script
(convert_llava_onevision_weights_to_hf.py) makes of it: two more tokens, rounded up to a multiple of 64."""
