"""Floating-point operations of a micro-batch, counted from shapes alone; vision and language apart.

A matrix product of [m, k] and [k, n] is 2·m·k·n. Attention counts the pairs that are attended to: L² for a frame of
L patches, L·(L+1)/2 for a causal document. Norms, activations and rotary are left out, as is usual; so is what a
kernel computes twice or for nothing, such as scores that are recomputed in the backward or masked.
"""

from __future__ import annotations

from collections.abc import Sequence

from tetrascope.models.family import ModelConfig


def vision_forward(config: ModelConfig, frames: Sequence[int]) -> float:
    """Vision encoder and adaptor, forward, for frames of the given numbers of patches."""
    patches = sum(frames)
    return (
        _patch_embedding(config, patches)
        + _encoder_linears(config, patches)
        + _adaptor(config, patches)
        + _vision_attention(config, frames)
    )


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
    config: ModelConfig,
    frames: Sequence[int],
    documents: Sequence[int],
    vision_trained: bool = True,
    language_trained: bool = True,
) -> tuple[float, float]:
    """Forward and backward, as (vision, language), for the given numbers of patches a frame and tokens a document.

    A linear costs its forward once more for the gradient of its weights, if they are trained, and once more for the
    gradient of its input, if anything below it is trained. Attention has no weights, and each of its products has
    two inputs: twice its forward, if anything below is trained. Nothing is below the patch embedding; below the
    decoder lie its token embedding and the vision part. A document without an image counts like the others: in a
    packed micro-batch its gradient is computed along with theirs.
    """
    patches, tokens = sum(frames), sum(documents)
    vision_linears = _encoder_linears(config, patches) + _adaptor(config, patches)
    vision = (
        _patch_embedding(config, patches) * (1 + vision_trained)
        + vision_linears * (1 + 2 * vision_trained)
        + _vision_attention(config, frames) * (1 + 2 * vision_trained)
    )
    reached = vision_trained or language_trained  # whether gradients flow through the decoder at all
    linears = config.decoder.layers * _layer_linears(config, tokens) + head_forward(config, tokens)
    attention = config.decoder.layers * _layer_attention(config, documents)
    return vision, linears * (1 + language_trained + reached) + attention * (1 + 2 * reached)


def _patch_embedding(config: ModelConfig, patches: int) -> float:
    return 2.0 * patches * config.vision.patch_width * config.vision.width


def _encoder_linears(config: ModelConfig, patches: int) -> float:
    """Query, key, value and output projections and the two linears of the MLP, of all blocks."""
    v = config.vision
    return 2.0 * patches * v.layers * (4 * v.width**2 + 2 * v.width * v.mlp)


def _adaptor(config: ModelConfig, patches: int) -> float:
    """Two linears on one row of `merged` features for each block of merge² patches."""
    v = config.vision
    merged = v.width * v.merge**2
    return 2.0 * patches / v.merge**2 * merged * (merged + config.decoder.hidden)


def _vision_attention(config: ModelConfig, frames: Sequence[int]) -> float:
    """Scores and weighted sum, 2·E each for a pair of patches, in every block."""
    return 4.0 * config.vision.layers * config.vision.width * sum(n * n for n in frames)


def _layer_linears(config: ModelConfig, tokens: int) -> float:
    """Query, key, value and output projections, gate, up and down."""
    d = config.decoder
    return 2.0 * tokens * d.hidden * (sum(d.qkv_rows) + d.qkv_rows[0] + 3 * d.intermediate)


def _layer_attention(config: ModelConfig, documents: Sequence[int]) -> float:
    """Scores and weighted sum, 2·N·D each for a pair of tokens."""
    return 4.0 * config.decoder.qkv_rows[0] * sum(n * (n + 1) / 2 for n in documents)
