"""Floating-point operations of a micro-batch, counted from shapes alone; vision and language apart.

A matrix product of [m, k] and [k, n] is 2·m·k·n. Attention counts the pairs that are attended to: L² for a frame of
L patches, L·(L+1)/2 for a causal document. Norms, activations and rotary are left out, as is usual; so is what a
kernel computes twice or for nothing, such as scores that are recomputed in the backward or masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tetrascope.engine.modules import ALL_TRAINED, Trained
from tetrascope.models.family import ModelConfig
from tetrascope.models.media import Media, square_pairs


def vision_forward(config: ModelConfig, media: Sequence[Media]) -> float:
    """Vision encoder and adaptor, forward, for these images and videos."""
    return _patch_embedding(config, media) + _encoder(config, media) + _adaptor(config, media)


def layer_forward(config: ModelConfig, documents: Sequence[int]) -> float:
    """One decoder layer, forward, for documents of the given numbers of tokens."""
    return _layer_linears(config, sum(documents)) + _layer_attention(config, documents)


def head_forward(config: ModelConfig, tokens: int) -> float:
    """The output head, forward."""
    return 2.0 * tokens * config.decoder.hidden * config.decoder.vocab


def language_forward(config: ModelConfig, documents: Sequence[int]) -> float:
    """Decoder layers and head, forward."""
    return config.decoder.layers * layer_forward(config, documents) + head_forward(config, sum(documents))


def training_flops(
    config: ModelConfig, media: Sequence[Media], documents: Sequence[int], trained: Trained = ALL_TRAINED
) -> tuple[float, float]:
    """Forward and backward, as (vision with adaptor, language), for images and for documents of so many tokens.

    A linear costs its forward once more for the gradient of its weights, if they are trained, and once more for the
    gradient of its input, if anything below it is trained. Attention has no weights, and each of its products has
    two inputs: twice its forward, if anything at or below its layer is trained. Nothing is below the patch embedding;
    below the decoder lie its token embedding, the adaptor and the encoder. A document without an image counts like
    the others: in a packed micro-batch its gradient is computed along with theirs.
    """
    vision = (
        _patch_embedding(config, media) * (1 + trained.vision)
        + _encoder(config, media) * (1 + 2 * trained.vision)
        + _adaptor(config, media) * (1 + trained.adaptor + trained.vision)
    )
    tokens, d = sum(documents), config.decoder
    below = trained.vision or trained.adaptor or trained.embeddings
    through = below or trained.language  # whether gradients flow through the decoder layers
    linears = d.layers * _layer_linears(config, tokens) * (1 + trained.language + through)
    attention = d.layers * _layer_attention(config, documents) * (1 + 2 * through)
    head = head_forward(config, tokens) * (1 + trained.embeddings + through)
    return vision, linears + attention + head


class Products(NamedTuple):
    """FLOPs of linears, and of attention's scores and weighted sums, which kernels compute at another rate."""

    linears: float
    attention: float


class Work(NamedTuple):
    """The parts of forward and backward: a linear's gradient of its input is one product, that of its weights another,
    and both of attention's gradients count as input's."""

    forward: Products
    backward_input: Products
    backward_weight: Products


def vision_work(config: ModelConfig, media: Sequence[Media], trained: Trained = ALL_TRAINED) -> Work:
    """Vision encoder and adaptor; the parts add up to the first number of `training_flops`."""
    patch, adaptor = _patch_embedding(config, media), _adaptor(config, media)
    linears, attention = _encoder_linears(config, media), _encoder_attention(config, media)
    return Work(
        Products(patch + linears + adaptor, attention),
        Products((linears + adaptor) * trained.vision, 2 * attention * trained.vision),
        Products((patch + linears) * trained.vision + adaptor * trained.adaptor, 0.0),
    )


def layer_work(config: ModelConfig, documents: Sequence[int], trained: bool = True, below: bool = True) -> Work:
    """One decoder layer. trained: whether it is; below: whether anything before it is. With that of `head_work`, for
    all layers, the parts add up to the second number of `training_flops`."""
    linears, attention = _layer_linears(config, sum(documents)), _layer_attention(config, documents)
    through = trained or below
    return Work(
        Products(linears, attention),
        Products(linears * through, 2 * attention * through),
        Products(linears * trained, 0.0),
    )


def head_work(config: ModelConfig, tokens: int, trained: bool = True, below: bool = True) -> Work:
    """The output head. trained: whether it is; below: whether anything before it is."""
    linears = head_forward(config, tokens)
    return Work(Products(linears, 0.0), Products(linears * below, 0.0), Products(linears * trained, 0.0))


def _patch_embedding(config: ModelConfig, media: Sequence[Media]) -> float:
    return 2.0 * config.vision_cost.patch * sum(one.patches for one in media)


def _encoder(config: ModelConfig, media: Sequence[Media]) -> float:
    return _encoder_linears(config, media) + _encoder_attention(config, media)


def _encoder_linears(config: ModelConfig, media: Sequence[Media]) -> float:
    """Linears of all blocks."""
    return 2.0 * config.vision_cost.linears * sum(one.patches for one in media)


def _encoder_attention(config: ModelConfig, media: Sequence[Media]) -> float:
    """Scores and weighted sums of every pair of rows that attend to each other."""
    cost = config.vision_cost
    return 2.0 * sum(
        cost.attention * square_pairs(one.frames) + cost.window_attention * square_pairs(one.windows) for one in media
    )


def _adaptor(config: ModelConfig, media: Sequence[Media]) -> float:
    return 2.0 * config.vision_cost.adaptor * sum(one.features for one in media)


def _layer_linears(config: ModelConfig, tokens: int) -> float:
    """Query, key, value and output projections, gate, up and down."""
    d = config.decoder
    return 2.0 * tokens * d.hidden * (sum(d.qkv_rows) + d.qkv_rows[0] + 3 * d.intermediate)


def _layer_attention(config: ModelConfig, documents: Sequence[int]) -> float:
    """Scores and weighted sum, 2·N·D each for a pair of tokens."""
    return 4.0 * config.decoder.qkv_rows[0] * sum(n * (n + 1) / 2 for n in documents)
