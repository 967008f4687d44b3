"""One-dimensional position ids, plain and V2PE (arXiv 2412.09616 §3.2), in integer units of 1/256 of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.layers.rotary import POSITION_UNIT

STRIDES = tuple(2**i for i in range(9))
"""What `v2pe_rnd` draws from: the span of 256 visual tokens, in tokens."""

Draw = tuple[int, int, int]
"""(seed, sample number, epoch): what random choices about a sample are drawn from, the same on every rank."""


@dataclass(frozen=True)
class PositionRule:
    """How far apart visual tokens are.

    rule: `default` counts them like text; `v2pe_fix` gives 256 of them a span of `stride` tokens; `v2pe_rnd` draws
    the stride anew for every image, sample and epoch.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rule: str = "default"
    stride: int = 256

    def __post_init__(self) -> None:
        if self.rule not in ("default", "v2pe_fix", "v2pe_rnd"):
            raise UserError(f"model.config.positions.rule: {self.rule!r} must be default, v2pe_fix or v2pe_rnd")
        if not 1 <= self.stride <= POSITION_UNIT:
            raise UserError(f"model.config.positions.stride: {self.stride} must be between 1 and {POSITION_UNIT}")

    def strides(self, images: int, draw: Draw) -> list[int]:
        """The stride of every image of a sample."""
        if self.rule == "v2pe_rnd":
            seed, sample, epoch = draw
            generator = np.random.Generator(np.random.Philox(key=[seed, sample], counter=[0, 0, epoch, 0]))
            return [STRIDES[i] for i in generator.integers(len(STRIDES), size=images)]
        return [POSITION_UNIT if self.rule == "default" else self.stride] * images


def linear_positions(visual_T: np.ndarray, runs: Sequence[int], rule: PositionRule, draw: Draw) -> np.ndarray:
    """Position ids int64 `[1, T]` of one sample, in units of 1/256 of a token.

    visual: bool `[T]`, which tokens are visual. runs: lengths of the images' runs of visual tokens, in order. A text
    token comes a whole token after what was before it; the k-th token of an image lies k strides after it; after an
    image, text goes on from its last position rounded up to a whole token.

    Raises UserError when the visual tokens do not match the runs.
    """
    positions = np.empty((1, len(visual_T)), dtype=np.int64)
    row, last = 0, -POSITION_UNIT
    for run, stride in zip(runs, rule.strides(len(runs), draw), strict=True):
        text = int(visual_T[row:].argmax()) if visual_T[row:].any() else len(visual_T) - row
        positions[0, row : row + text] = last + POSITION_UNIT * np.arange(1, text + 1)
        row, last = row + text, last + POSITION_UNIT * text
        if row + run > len(visual_T) or not visual_T[row : row + run].all():
            raise UserError(f"sample: expected {run} visual tokens at token {row}")
        positions[0, row : row + run] = last + stride * np.arange(1, run + 1)
        row, last = row + run, -(-(last + stride * run) // POSITION_UNIT) * POSITION_UNIT
    if visual_T[row:].any():
        raise UserError(f"sample: {int(visual_T[row:].sum())} visual tokens belong to none of its {len(runs)} images")
    positions[0, row:] = last + POSITION_UNIT * np.arange(1, len(visual_T) - row + 1)
    return positions
