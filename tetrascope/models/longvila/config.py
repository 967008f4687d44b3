"""Shapes of LongVILA (VILA with a Qwen2 decoder)."""

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

IMAGE_TOKEN = "<image>"
"""What VILA's text has in the place of a picture or frame; its builder.py adds it to tokenizers that lack it."""

DOWNSAMPLE = ("mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_fix")
"""VILA's names of the projector that makes one feature of 2 x 2 patches. What its repository computes under them today
is the same; the last is the name in LongVILA's training scripts."""

PROJECTORS = (*DOWNSAMPLE, "mlp2x_gelu", "linear")


@dataclass(frozen=True)
class LongVilaVision(ViTShape):
    """SigLIP, of which VILA takes the hidden states before the last block. `used` 0: all blocks but one.

    pooling_head: the checkpoint holds SigLIP's attention-pooling head, which is kept for export and never computed.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    activation: str = "gelu_pytorch_tanh"
    post_norm: bool = True
    pooling_head: bool = False

    def __post_init__(self) -> None:
        if not self.used:
            object.__setattr__(self, "used", self.layers - 1)


@dataclass(frozen=True)
class LongVilaDecoder(DecoderShape):
    """The Qwen2 decoder. rope_theta: stage 4 of LongVILA raises it with the length of its samples."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True
    tied_embeddings: bool = False


@dataclass(frozen=True)
class LongVilaConfig:
    """LongVILA.

    image_token_id: the id that visual tokens have in a sample, of a token that texts never contain (chat.py). It need
    not be in the tokenizer, but must be in the decoder's vocabulary, which never grows.
    projector: one of PROJECTORS. token_order: in which order the features of a frame become tokens, `rows` (VILA from
    December 2024 on) or `columns` (mlp_downsample of VILA 1.5 and of LongVILA's first release).
    frames: of a video where `data.max_frames` does not say (`num_video_frames`). positions: V2PE's switch.
    max_positions: stated in config.json, for other programs. max_tokens of the data is what bounds a sample.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: LongVilaDecoder
    vision: LongVilaVision
    image_token_id: int
    eos_token_id: int
    pad_token_id: int
    projector: str = "mlp_downsample"
    token_order: str = "rows"
    frames: int = 8
    positions: PositionRule = PositionRule()
    initializer_range: float = 0.02
    max_positions: int = 32768

    @property
    def downsample(self) -> bool:
        """Whether the projector makes one feature of 2 x 2 patches."""
        return self.projector in DOWNSAMPLE

    @property
    def side(self) -> int:
        """Features along a side of a frame."""
        return (self.vision.side + 1) // 2 if self.downsample else self.vision.side

    @property
    def projected_width(self) -> int:
        """Width of what the projector's linears take."""
        return self.vision.width * (4 if self.downsample else 1)

    @property
    def vision_cost(self) -> VisionCost:
        """Multiply-adds of encoder and projector."""
        v, hidden = self.vision, self.decoder.hidden
        second = 0 if self.projector == "linear" else hidden**2
        return VisionCost(
            patch=v.patch_width * v.width,
            linears=v.linears,
            attention=v.attention,
            adaptor=self.projected_width * hidden + second,
        )

    @property
    def typical(self) -> Media:
        """Any picture: all cost the same."""
        return picture(self, (self.vision.image, self.vision.image))

    def __post_init__(self) -> None:
        d, v = self.decoder, self.vision
        for section, shape in (("decoder", d), ("vision", v)):
            check_positive(section, shape)
            for field, needed in (QWEN2 if section == "decoder" else SIGLIP).items():
                if getattr(shape, field) != needed:
                    raise UserError(f"model.config.{section}.{field}: must be {needed} in LongVILA; remove it")
        check_heads(d, own_width=True)
        check_vit(v)
        if v.image < v.patch:
            raise UserError(f"model.config.vision: image {v.image} must be at least patch {v.patch}")
        if self.projector not in PROJECTORS:
            raise UserError(f"model.config.projector: {self.projector!r} must be one of {', '.join(PROJECTORS)}")
        if self.token_order not in ("rows", "columns"):
            raise UserError(f"model.config.token_order: {self.token_order!r} must be 'rows' or 'columns'")
        if self.token_order == "columns" and not self.downsample:
            raise UserError(
                f"model.config.token_order: the projector {self.projector} has no order but 'rows'; remove it"
            )
        if self.frames < 1:
            raise UserError(f"model.config.frames: {self.frames} must be greater than 0")
        if not 0 <= self.image_token_id < d.vocab:
            raise UserError(
                f"model.config.image_token_id: {self.image_token_id} must be an id of the decoder's vocabulary of "
                f"{d.vocab}, one that no text uses"
            )
        if self.image_token_id == self.eos_token_id:
            raise UserError(
                f"model.config.image_token_id: {self.image_token_id} is eos_token_id too, which ends every answer; "
                "give the id of a token that no text contains"
            )


SIGLIP = {
    "channels": 3,
    "class_token": False,
    "pre_norm": False,
    "layer_scale": False,
    "patch_bias": True,
    "post_norm": True,
}
"""What SigLIP is by definition: no field of its config.json says otherwise."""

QWEN2 = {"qkv_bias": True, "qk_norm": False}
"""The same of the decoder."""


def picture(config: LongVilaConfig, size: tuple[int, int]) -> Media:
    """An image: one square view."""
    tokens = config.side**2
    return Media("image", (1,), (config.vision.rows,), tokens, tokens, size=size)


def clip(
    config: LongVilaConfig, numbers: tuple[int, ...], times: tuple[float, ...] = (), size: tuple[int, int] = (0, 0)
) -> Media:
    """The frames `numbers` of a video, each a square view."""
    frames = len(numbers)
    tokens = frames * config.side**2
    rows = (config.vision.rows,) * frames
    return Media("video", (frames,), rows, tokens, tokens, numbers=numbers, times=times, size=size)


def complete(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Fills `decoder.vocab` and the special token ids that the configuration leaves out, from the tokenizer.

    The image's token is the tokenizer's `<image>`, or else the first id after its tokens, which VILA would give it.
    Raises UserError when the decoder's vocabulary has no room for that id, or the tokenizer no end of text.
    """
    filled = dict(config)
    eos = tokenizer.eos_token_id
    if eos is None and "eos_token_id" not in filled:
        raise UserError("data.tokenizer: has no eos_token, which LongVILA needs; add <|im_end|> as that")
    filled.setdefault("eos_token_id", eos)
    filled.setdefault(
        "pad_token_id", filled["eos_token_id"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    vocab = len(tokenizer)
    if isinstance(filled.get("decoder"), dict):
        filled["decoder"] = {"vocab": vocab, **filled["decoder"]}
        vocab = filled["decoder"]["vocab"]
    if "image_token_id" not in filled:
        filled["image_token_id"] = tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))
        if isinstance(vocab, int) and filled["image_token_id"] >= vocab:
            raise UserError(
                f"data.tokenizer: has no token {IMAGE_TOKEN}, and model.config.decoder.vocab={vocab} has no room for "
                "it; add it as a special token, or make the vocabulary larger than the tokenizer"
            )
    return filled


def _preset(
    hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> Callable[[], LongVilaConfig]:
    return lambda: LongVilaConfig(
        decoder=LongVilaDecoder(hidden, intermediate, 28, heads, kv_heads, vocab, tied_embeddings=tied),
        vision=LongVilaVision(width=1152, layers=27, heads=16, mlp=4304, image=384),
        image_token_id=151649,
        eos_token_id=151645,
        pad_token_id=151643,
    )


PRESETS = {
    "1.5b": _preset(1536, 8960, 12, 2, 151936, tied=True),
    "7b": _preset(3584, 18944, 28, 4, 152064, tied=False),
}
"""Qwen2-1.5B and Qwen2-7B (their config.json) with SigLIP so400m-patch14-384. Token ids: VILA's constants.py."""
