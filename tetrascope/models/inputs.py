"""What a model is fed with: one packed micro-batch, as one rank sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tetrascope.models.layers.packed import Packed


@dataclass(frozen=True)
class VisionInputs:
    """The images and frames of a micro-batch.

    patches: float `[N, P]`, the patch rows that this rank embeds (all rows, or its share under tensor parallelism).
    positions: int64 `[K, N_all]`, what the encoder must know of every row, as the family defines it; here: int64
    `[K, N]`, the same for the rows in `patches`.
    frames, windows: lengths of the attention sequences in rows; their totals are N_all (windows: None without any).
    features: those that the tokens are picked from. exchange: how they come from the ranks that computed them, for the
    module that takes `Deliver`'s place; None without one.
    rows: int64 `[M]`, which of this rank's hidden rows are visual tokens.
    picks: int64 `[C, M]`, weights: float32 `[C, M]` or None: each of those rows is a weighted sum of C features.
    """

    patches_NP: Tensor
    positions_KN: Tensor
    here_KN: Tensor
    frames: Packed
    windows: Packed | None
    features: int
    rows_M: Tensor
    picks_CM: Tensor
    weights_CM: Tensor | None
    exchange: Any = None


@dataclass(frozen=True)
class Inputs:
    """A packed micro-batch.

    token_ids: int64 `[T]`; positions: int64 `[axes, T]` (3 axes for M-RoPE, 1 otherwise, then in 1/256 of a token);
    documents: sample lengths, total T. vision: None when the micro-batch has no image or this stage does not encode.
    """

    token_ids_T: Tensor
    positions_AT: Tensor
    documents: Packed
    vision: VisionInputs | None
