"""Checks of a configuration that every family makes of its decoder and its vision encoder."""

from __future__ import annotations

from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.vit import ACTIVATIONS, ViTShape


def check_positive(section: str, shape: Any) -> None:
    """Raises UserError for a number of the section `model.config.<section>` that is not greater than 0."""
    for field, value in vars(shape).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise UserError(f"model.config.{section}.{field}: {value} must be greater than 0")


def check_heads(decoder: DecoderShape, own_width: bool = False) -> None:
    """Raises UserError for head counts and widths that do not fit each other.

    own_width: the family's config.json has a `head_dim`, so that heads may be wider or narrower than hidden / heads.
    """
    d = decoder
    derived = d.head_dim == d.hidden // d.heads
    if d.head_dim % 2 or (derived and d.hidden % d.heads):
        raise UserError(f"model.config.decoder: hidden {d.hidden} must be an even multiple of heads {d.heads}")
    if not derived and not own_width:
        raise UserError(
            f"model.config.decoder.head_dim: {d.head_dim} must be hidden / heads, {d.hidden} / {d.heads}, which is all "
            "that the family's config.json can say; remove it"
        )
    if d.heads % d.kv_heads:
        raise UserError(f"model.config.decoder: heads {d.heads} must be a multiple of kv_heads {d.kv_heads}")


def check_vit(vision: ViTShape) -> None:
    """Raises UserError for a plain vision transformer whose sizes or activation do not fit."""
    v = vision
    if v.width % v.heads:
        raise UserError(f"model.config.vision: width {v.width} must be a multiple of heads {v.heads}")
    if v.used > v.layers:
        raise UserError(f"model.config.vision.used: {v.used} is more than layers {v.layers}")
    if v.activation not in ACTIVATIONS:
        raise UserError(f"model.config.vision.activation: {v.activation!r} must be one of {', '.join(ACTIVATIONS)}")
