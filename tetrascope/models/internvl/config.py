"""Shapes of InternVL and the special tokens that it needs; hf_config.py reads and writes its config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tetrascope.errors import UserError
from tetrascope.models.hf_fields import special_token
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.media import Media, VisionCost
from tetrascope.models.shape_checks import check_heads, check_positive

KINDS = ("internlm2", "qwen2", "llama")
"""Decoders. They compute alike but for qwen2's biases; their checkpoints name and fuse the tensors differently."""

TEMPLATES = {"internlm2-chat": "internlm2-chat", "Hermes-2": "internlm2-chat", "internvl2_5": "internvl2_5"}
"""What `template` in config.json may say -> our chat format; Hermes-2 differs from internlm2-chat in name only."""

SHUFFLE = 2
"""Patches along each side of the block that pixel shuffle (ratio 0.5) makes one feature of."""


@dataclass(frozen=True)
class InternVLDecoder(DecoderShape):
    """InternLM2, Qwen2 or Llama; see KINDS. The defaults are those of Qwen2."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True
    tied_embeddings: bool = False
    kind: str = "qwen2"


@dataclass(frozen=True)
class InternViTShape(ViTShape):
    """InternViT: class token, LayerScale, no norm after the last block. The defaults are InternViT-300M-448px."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image: int = 448
    class_token: bool = True
    layer_scale: bool = True


@dataclass(frozen=True)
class InternVLConfig:
    """InternVL2, 2.5 and 3.

    image_token_id: the token that stands for a visual one, `<IMG_CONTEXT>`. eos_token_id: of a turn, `<|im_end|>`.
    min_tiles, max_tiles, thumbnail: how a picture is cut (layers/tiles.py); `data.max_tiles` comes before max_tiles.
    template: the checkpoint's chat format, one of TEMPLATES; empty: the one usual for the decoder. system_message: of
    conversations that have none; None: the format's own, empty: none at all.
    max_positions, rope_scaling_factor: the checkpoint's rotary base grows with this factor (dynamic NTK) for samples
    longer than max_positions; 0 for no such rule. The growth itself is not available: such samples are refused.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoder: InternVLDecoder
    image_token_id: int
    eos_token_id: int
    pad_token_id: int
    vision: InternViTShape = InternViTShape()
    positions: PositionRule = PositionRule()
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    template: str = ""
    system_message: str | None = None
    initializer_range: float = 0.02
    max_positions: int = 32768
    rope_scaling_factor: float = 0.0

    @property
    def chat_template(self) -> str:
        """The checkpoint's chat format, the usual one where it names none."""
        return self.template or ("internlm2-chat" if self.decoder.kind == "internlm2" else "internvl2_5")

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return (self.vision.side // SHUFFLE) ** 2

    @property
    def shuffled_width(self) -> int:
        """Width of a feature before the adaptor's linears."""
        return self.vision.width * SHUFFLE**2

    @property
    def vision_cost(self) -> VisionCost:
        v, hidden = self.vision, self.decoder.hidden
        return VisionCost(
            patch=v.patch_width * v.width,
            linears=v.linears,
            attention=v.attention,
            adaptor=hidden * (self.shuffled_width + hidden),
        )

    @property
    def typical(self) -> Media:
        """A picture of one tile."""
        return tiled(self, (1, 1, 1), 1)

    def __post_init__(self) -> None:
        d, v = self.decoder, self.vision
        check_positive("decoder", d)
        check_positive("vision", v)
        if d.kind not in KINDS:
            raise UserError(f"model.config.decoder.kind: {d.kind!r} must be one of {', '.join(KINDS)}")
        if d.qkv_bias != (d.kind == "qwen2") or d.qk_norm:
            raise UserError(
                f"model.config.decoder: {d.kind} needs qkv_bias {str(d.kind == 'qwen2').lower()} and qk_norm false"
            )
        check_heads(d)
        if v.width % v.heads:
            raise UserError(f"model.config.vision: width {v.width} must be a multiple of heads {v.heads}")
        if v.image % (v.patch * SHUFFLE):
            raise UserError(f"model.config.vision: image {v.image} must be a multiple of {SHUFFLE} x patch {v.patch}")
        if not (v.class_token and v.layer_scale and v.patch_bias) or v.pre_norm or v.post_norm or v.used != v.layers:
            raise UserError(
                "model.config.vision: InternViT needs class_token, layer_scale and patch_bias true, pre_norm and "
                "post_norm false, and used equal to layers; leave them out"
            )
        if (
            v.rows <= v.heads
        ):  # rows that pad the encoder's sequence to a multiple of the ranks must be less than a tile
            raise UserError(f"model.config.vision: a tile's {v.rows} rows must be more than heads {v.heads}")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise UserError(
                f"model.config: min_tiles {self.min_tiles} must be between 1 and max_tiles {self.max_tiles}"
            )
        if self.template and self.template not in TEMPLATES:
            raise UserError(f"model.config.template: {self.template!r} must be one of {', '.join(TEMPLATES)}")


def tiled(config: InternVLConfig, grid: tuple[int, int, int], tiles: int, **more: Any) -> Media:
    """A picture of so many tiles, the thumbnail included. grid: tile columns and rows, and the most tiles allowed."""
    tokens = tiles * config.tile_tokens
    return Media("image", grid, (config.vision.rows,) * tiles, tokens, tokens, **more)


def framed(config: InternVLConfig, frames: int, **more: Any) -> Media:
    """A video of so many frames, a tile each."""
    tokens = frames * config.tile_tokens
    return Media("video", (frames,), (config.vision.rows,) * frames, tokens, tokens, **more)


TOKENS = {"image_token_id": "<IMG_CONTEXT>", "eos_token_id": "<|im_end|>"}


def complete(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Fills `decoder.vocab` and the special token ids that the configuration leaves out, from the tokenizer.

    Raises UserError when the tokenizer lacks one of them.
    """
    filled = dict(config)
    for field, token in TOKENS.items():
        if field not in filled:
            filled[field] = token_id(tokenizer, token)
    if "pad_token_id" not in filled:
        filled["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else filled["eos_token_id"]
        )
    if isinstance(filled.get("decoder"), dict):
        filled["decoder"] = {"vocab": len(tokenizer), **filled["decoder"]}
    return filled


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a special token. Raises UserError when the tokenizer has none."""
    return special_token(tokenizer, token, "InternVL")


def _preset(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, template: str
) -> Callable[[], InternVLConfig]:
    internlm2 = kind == "internlm2"
    # Nine tokens were added to the language model's: <img>, </img>, <IMG_CONTEXT>, then borders of quads, refs, boxes.
    return lambda: InternVLConfig(
        decoder=InternVLDecoder(
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            vocab,
            rms_eps=1e-5 if internlm2 else 1e-6,
            qkv_bias=not internlm2,
            kind=kind,
        ),
        image_token_id=vocab - 7,
        eos_token_id=92542 if internlm2 else 151645,
        pad_token_id=2 if internlm2 else 151643,
        template=template,
        rope_scaling_factor=2.0,
    )


PRESETS = {
    "internvl2-1b": _preset("qwen2", 896, 4864, 24, 14, 2, 151655, "Hermes-2"),
    "internvl2-2b": _preset("internlm2", 2048, 8192, 24, 16, 8, 92553, "internlm2-chat"),
    "internvl2-8b": _preset("internlm2", 4096, 14336, 32, 32, 8, 92553, "internlm2-chat"),
    "internvl2_5-1b": _preset("qwen2", 896, 4864, 24, 14, 2, 151674, "internvl2_5"),
    "internvl2_5-2b": _preset("internlm2", 2048, 8192, 24, 16, 8, 92553, "internvl2_5"),
    "internvl2_5-4b": _preset("qwen2", 2048, 11008, 36, 16, 2, 151674, "internvl2_5"),
    "internvl2_5-8b": _preset("internlm2", 4096, 14336, 32, 32, 8, 92553, "internvl2_5"),
    "internvl3-1b": _preset("qwen2", 896, 4864, 24, 14, 2, 151674, "internvl2_5"),
    "internvl3-2b": _preset("qwen2", 1536, 8960, 28, 12, 2, 151674, "internvl2_5"),
    "internvl3-8b": _preset("qwen2", 3584, 18944, 28, 28, 4, 151674, "internvl2_5"),
}
"""Sizes of the published OpenGVLab/InternVL2, InternVL2_5 and InternVL3 checkpoints that have InternViT-300M."""
