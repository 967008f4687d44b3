"""What a model is fed with: one packed micro-batch, as one rank sees it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tetrascope.models.layers.packed import Packed


@dataclass(frozen=True)
class VisionInputs:
    """The images and frames of a micro-batch.

    patches: float `[N, P]`, the patch rows that this rank embeds (all rows, or its share under tensor parallelism).
    positions: int64 `[2, N_all]`, height and width of every patch in its frame, in patch units.
    frames: lengths of the frames in patch rows; their total is N_all.
    rows: int64 `[M]`, which of this rank's hidden rows are visual tokens.
    picks: int64 `[M]`, which merged feature goes to each of those rows.
    """

    patches_NP: Tensor
    positions_2N: Tensor
    frames: Packed
    rows_M: Tensor
    picks_M: Tensor


@dataclass(frozen=True)
class Inputs:
    """A packed micro-batch.

    token_ids: int64 `[T]`; positions: int64 `[axes, T]` (3 axes for M-RoPE); documents: sample lengths, total T.
    vision: None when the micro-batch has no image or this stage does not encode.
    """

    token_ids_T: Tensor
    positions_3T: Tensor
    documents: Packed
    vision: VisionInputs | None
