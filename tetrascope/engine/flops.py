"""Floating-point operations of a micro-batch, counted from shapes alone; vision and language apart.

A matrix product of [m, k] and [k, n] is 2·m·k·n. Attention counts the pairs that are attended to: L² for a frame of
L patches, L·(L+1)/2 for a causal document. Norms, activations and rotary are left out, as is usual.
"""

from __future__ import annotations

from collections.abc import Sequence

from tetrascope.models.family import ModelConfig


def vision_forward(config: ModelConfig, frames: Sequence[int]) -> float:
    """Vision encoder and adaptor, forward, for frames of the given numbers of patches."""
    v, hidden = config.vision, config.decoder.hidden
    patches = sum(frames)
    merged = v.width * v.merge**2
    linear = v.layers * (4 * v.width**2 + 2 * v.width * v.mlp) + v.patch_width * v.width
    adaptor = merged * (merged + hidden) / v.merge**2
    pairs = sum(n * n for n in frames)
    return 2.0 * patches * (linear + adaptor) + 4.0 * v.layers * pairs * v.width


def layer_forward(config: ModelConfig, documents: Sequence[int]) -> float:
    """One decoder layer, forward, for documents of the given numbers of tokens."""
    d = config.decoder
    linear = d.hidden * (sum(d.qkv_rows) + d.qkv_rows[0] + 3 * d.intermediate)
    pairs = sum(n * (n + 1) / 2 for n in documents)
    return 2.0 * sum(documents) * linear + 4.0 * pairs * d.qkv_rows[0]


def head_forward(config: ModelConfig, tokens: int) -> float:
    """The output head, forward."""
    return 2.0 * tokens * config.decoder.hidden * config.decoder.vocab


def language_forward(config: ModelConfig, documents: Sequence[int]) -> float:
    """Decoder layers and head, forward."""
    return config.decoder.layers * layer_forward(config, documents) + head_forward(config, sum(documents))


TRAINING = 3.0
"""Forward and backward of a trained part against its forward: the backward takes two products for each."""
