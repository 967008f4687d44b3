"""Bytes that autograd keeps between forward and backward, from shapes alone.

Each term names a tensor that the layers of `models/layers` save (tests count the real ones). The attention kernel is
torch's scaled_dot_product_attention as `layers/attention.py` calls it: keys and values repeated for every query head.
Rows: those that the linears see on a rank, after context parallelism; between linears tensor parallelism leaves it a
share of 1/tp of them (`parallel/tensor`), and what a linear gathers is kept gathered. e: bytes of an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tetrascope.models.family import ModelConfig
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.media import Media
from tetrascope.models.weights import WeightMap

FP32 = 4
"""Statistics, rotations and the loss are in fp32 whatever the dtype."""


@dataclass(frozen=True)
class Kept:
    """Bytes between a part's forward and its backward.

    whole: all that is kept. rest: what is still kept between the gradients of its inputs and those of its weights: the
    inputs of its linears and the gradients of their outputs.
    """

    whole: float
    rest: float


@dataclass(frozen=True)
class EncoderShape:
    """What the bytes of a vision encoder's block depend on, for the encoders of all families.

    blocks: that are computed. mlp: hidden width of the MLP. gated: SwiGLU. copies: tensors of width `mlp` that a plain
    MLP keeps. rms: RMSNorm, otherwise LayerNorm. rotary: rotary positions. scaled: LayerScale. features: input width
    of each of the adaptor's linears.
    """

    patch: int
    width: int
    heads: int
    blocks: int
    mlp: int
    gated: bool
    copies: int
    rms: bool
    rotary: bool
    scaled: bool
    features: tuple[int, ...]


def encoder_shape(config: ModelConfig, weights: WeightMap) -> EncoderShape:
    """The shape of a family's encoder, read off its parameters where these say it."""
    vision: Any = config.vision
    block = "vision.blocks.0"
    gated = f"{block}.mlp.gate_up.weight" in weights
    first = weights[f"{block}.mlp.{'gate_up' if gated else 'fc1'}.weight"]
    rows = sum(piece.rows for piece in first)
    plain = isinstance(vision, ViTShape)
    # Quick GELU is x·σ(1.702 x), of which x, σ and the product are kept; of GELU, x and the result.
    quick = (vision.activation if plain else "quick_gelu" if hasattr(vision, "mlp_ratio") else "gelu") == "quick_gelu"
    matrices = [pieces for name, pieces in weights.items() if name.startswith("adaptor.")]
    return EncoderShape(
        patch=vision.patch_width,
        width=vision.width,
        heads=vision.heads,
        blocks=vision.used if plain else vision.layers,
        mlp=rows // 2 if gated else rows,
        gated=gated,
        copies=3 if quick else 2,
        rms=f"{block}.norm1.bias" not in weights,
        rotary=not plain,
        scaled=f"{block}.scale1.weight" in weights,
        features=tuple(m[0].tensor.matrix[1] for m in matrices if len(m[0].tensor.matrix) == 2),
    )


def decoder_layer(d: DecoderShape, lengths: Sequence[float], tp: int, e: int, trained: bool = True) -> Kept:
    """A decoder layer for documents of these lengths. trained: whether its own parameters are; what is kept for the
    gradients of weights alone is not kept otherwise."""
    rows, hidden = sum(lengths), d.hidden
    own = rows / tp
    q, k, _ = (n / tp for n in d.qkv_rows)
    inputs = 2 * rows * hidden * e  # of qkv and of gate_up, gathered
    norms = 2 * _rms_norm(own, hidden, e, trained)
    fused = d.qk_norm and e == FP32  # the norms' input, in fp32 anyway, is the fused linear's output
    if d.qk_norm:
        width = (0 if fused else FP32) + (e if trained else 0)
        norms += rows * (q + k) * (width + FP32 / d.head_dim)
    attention = _attention(rows, q, k, d.heads / tp, lengths, e, rotary=True, fused=fused)
    if not trained and len(set(lengths)) > 1:
        attention -= rows * q * e  # the copy of the output is for the projection's weights
    gates = rows * 4 * d.intermediate / tp * e  # gate, up, silu(gate), their product, which is down's input
    product = rows * d.intermediate / tp * e
    whole = norms + attention + gates + (inputs if trained else -product)
    outputs = rows * (2 * hidden + q + 2 * k + 2 * d.intermediate / tp) * e  # gradients: of proj and down, qkv, gate_up
    return Kept(whole, (inputs + rows * q * e + product + outputs) if trained else 0.0)


def encoder(shape: EncoderShape, media: Sequence[Media], windowed: float, tp: int, e: int) -> Kept:
    """Patch embedding and all blocks. windowed: share of the blocks that attend inside windows."""
    frames = tuple(n for one in media for n in one.frames)
    windows = tuple(n for one in media for n in one.windows) or frames
    full, inside = (encoder_block(shape, lengths, tp, e) for lengths in (frames, windows))
    patches = sum(frames) / tp * shape.patch * e
    a, b = shape.blocks * (1 - windowed), shape.blocks * windowed
    rest = patches + sum(frames) / tp * shape.width * e
    return Kept(patches + a * full.whole + b * inside.whole, rest + a * full.rest + b * inside.rest)


def encoder_block(shape: EncoderShape, lengths: Sequence[float], tp: int, e: int) -> Kept:
    """A block of the vision encoder for attention sequences of these lengths."""
    rows, width = sum(lengths), shape.width
    own, heads = rows / tp, width / tp
    inputs = 2 * rows * width * e
    norms = 2 * (_rms_norm(own, width, e) if shape.rms else own * (width * e + 2 * FP32))
    attention = _attention(rows, heads, heads, shape.heads / tp, lengths, e, shape.rotary)
    mlp = rows * (4 if shape.gated else shape.copies) * shape.mlp / tp * e
    scales = 2 * own * width * e if shape.scaled else 0.0
    outputs = rows * (2 * width + 3 * heads + (2 if shape.gated else 1) * shape.mlp / tp) * e
    rest = inputs + rows * (heads + shape.mlp / tp) * e + outputs
    return Kept(inputs + norms + attention + mlp + scales, rest)


def adaptor(shape: EncoderShape, features: float, tp: int, e: int) -> Kept:
    """The adaptor: of each linear its input, and what its input was made of (a norm's input, an activation's). The
    first linear's input is gathered."""
    first, *later = shape.features or (0,)
    inputs = features * (first + sum(later) / tp) * e
    whole = inputs + features * (first + sum(later)) / tp * e
    outputs = features * sum(later) / tp * e + features * first * e
    return Kept(whole, inputs + outputs)


def head(d: DecoderShape, rows: float, tp: int, e: int, trained: bool = True) -> Kept:
    """Final norm, output head and loss: the softmax over the vocabulary, in fp32, is what is kept of the logits."""
    inputs = rows * d.hidden * e
    vocab = rows * d.vocab / tp
    labels = rows * (8 + 1)  # int64 column and bool of each
    whole = _rms_norm(rows / tp, d.hidden, e, trained) + (inputs if trained else 0.0) + vocab * FP32 + labels
    return Kept(whole, inputs + vocab * e if trained else 0.0)


def head_workspace(d: DecoderShape, rows: float, tp: int, e: int) -> float:
    """Bytes that computing the loss takes beside what is kept: logits, their copy in fp32 (where they are not fp32
    themselves) and exponentials; the gradients in the backward are no more."""
    return rows * d.vocab / tp * (e + FP32 + (FP32 if e < FP32 else 0))


def layer_workspace(d: DecoderShape, rows: float, tp: int, e: int) -> float:
    """Bytes of a layer's backward beside what is kept: gradients of gate and up and of their product, and of hidden
    states, whole and in parts."""
    return rows * (4 * d.intermediate / tp + 3 * d.hidden) * e


def _rms_norm(rows: float, width: float, e: int, trained: bool = True) -> float:
    """RMSNorm: its input in fp32, one statistic a row, and for its weight's gradient the normed rows."""
    return rows * (width * (FP32 + (e if trained else 0)) + FP32)


def _attention(
    rows: float, q: float, k: float, heads: float, lengths: Sequence[float], e: int, rotary: bool, fused: bool = False
) -> float:
    """Queries, keys, values, output (which is also the projection's input) and logsumexp of every head.

    q, k: widths of a rank's queries and keys. fused: whether the fused linear's output is kept in any case. Values are
    a view of it, which keeps it as a whole, unless they were copied: repeated for all query heads, or brought into
    another order because documents of one length go together, which copies the output too.
    """
    several = len(set(lengths)) > 1
    copied = list(lengths) != sorted(lengths) or k < q
    own = (q + (q if k < q else k)) if rotary or copied else 0.0  # queries and keys
    own += (q if k < q else k) if copied else 0.0
    fused_too = (q + 2 * k) if fused or not copied else 0.0
    return rows * (own + fused_too + q * (2 if several else 1)) * e + rows * heads * FP32
