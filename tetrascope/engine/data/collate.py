"""From samples to the tensors of a packed micro-batch, as one tensor-parallel rank sees them.

Everything is computed on the whole micro-batch first and cut afterwards: labels are shifted inside each document
before any padding, positions never depend on the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.models.family import Family
from tetrascope.models.inputs import Inputs, VisionInputs
from tetrascope.models.layers.packed import Packed
from tetrascope.models.media import Media
from tetrascope.parallel.tensor.placement import share


@dataclass(frozen=True)
class Document:
    """A sample ready to be packed. patches: rows float32 `[n, P]` of all its images, None where this rank encodes
    none of them."""

    ids_T: np.ndarray
    positions_AT: np.ndarray
    weights_T: np.ndarray
    """float32 `[T]`: loss weight of each token as a target (0 = not supervised)."""
    media: tuple[Media, ...]
    patches: np.ndarray | None


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of the model, and for each row the token that follows it and the weight of predicting it."""

    inputs: Inputs
    labels_T: Tensor
    weights_T: Tensor


def collate(
    documents: Sequence[Document],
    family: Family,
    config: Any,
    rows: int,
    tp: int,
    tp_rank: int,
    encode: bool,
    device: torch.device,
) -> MicroBatch:
    """Packs documents into `rows` token rows (padding goes into a document of its own, weight zero).

    encode: whether this rank runs the vision encoder; then its share of the patch rows and of the visual tokens is
    prepared too. rows must divide by tp.
    """
    lengths = [len(d.ids_T) for d in documents]
    total = sum(lengths)
    pad = rows - total
    ids = np.concatenate([*(d.ids_T for d in documents), np.full(pad, config.pad_token_id, dtype=np.int64)])
    axes = documents[0].positions_AT.shape[0]
    positions = np.concatenate([*(d.positions_AT for d in documents), np.zeros((axes, pad), dtype=np.int64)], axis=1)
    labels = np.concatenate([*(_next(d.ids_T) for d in documents), np.zeros(pad, dtype=np.int64)])
    weights = np.concatenate([*(_next(d.weights_T) for d in documents), np.zeros(pad, dtype=np.float32)])
    vision = None
    if encode and any(d.media for d in documents):
        # What the features replace is looked for in the documents alone: a pad row must never count as visual.
        visual = np.flatnonzero(np.isin(ids[:total], family.visual_ids(config)))
        vision = _vision(documents, family, config, visual, rows, tp, tp_rank, device)
    inputs = Inputs(
        token_ids_T=torch.from_numpy(ids).to(device),
        positions_AT=torch.from_numpy(positions).to(device),
        documents=Packed((*lengths, pad) if pad else tuple(lengths)),
        vision=vision,
    )
    return MicroBatch(inputs, torch.from_numpy(labels).to(device), torch.from_numpy(weights).to(device))


def encoded_here(patches: Sequence[int], family: Family, config: Any, tp: int, tp_rank: int) -> list[bool]:
    """For documents with so many patch rows each, in their order in a micro-batch: whether some are this rank's."""
    _, own = _share(sum(patches), family, config, tp)
    first, last = tp_rank * own, (tp_rank + 1) * own
    return [n > 0 and end - n < last and end > first for n, end in zip(patches, accumulate(patches), strict=True)]


def _share(rows: int, family: Family, config: Any, tp: int) -> tuple[int, int]:
    """Padding of a micro-batch's patch rows, and the rows of each tensor-parallel rank: whole row blocks."""
    pad = -rows % (family.row_block(config) * tp)
    return pad, (rows + pad) // tp


def _next(x_T: np.ndarray) -> np.ndarray:
    """Shifts a document by one: row i gets what belongs to token i+1, the last row zero."""
    return np.concatenate([x_T[1:], np.zeros(1, dtype=x_T.dtype)])


def _vision(
    documents: Sequence[Document],
    family: Family,
    config: Any,
    visual_rows: np.ndarray,
    rows: int,
    tp: int,
    tp_rank: int,
    device: torch.device,
) -> VisionInputs:
    """This rank's contiguous share of the patch rows, padded so that every rank has as many whole row blocks."""
    media = tuple(one for d in documents for one in d.media)
    layout = family.vision_layout(config, media)
    frames = tuple(n for one in media for n in one.frames)
    windows = tuple(n for one in media for n in one.windows)
    pad, own = _share(sum(frames), family, config, tp)
    here = slice(tp_rank * own, (tp_rank + 1) * own)
    blank = np.zeros((sum(frames) + pad, config.vision.patch_width), dtype=np.float32)
    sizes = [sum(one.patches for one in d.media) for d in documents]
    patches = [blank[:n] if d.patches is None else d.patches for d, n in zip(documents, sizes, strict=True) if n]
    padded = np.concatenate([*patches, blank[:pad]])
    positions_KN = torch.nn.functional.pad(layout.positions_KN, (0, pad)).to(device)
    mine = share(rows, tp, tp_rank)
    chosen = np.flatnonzero((visual_rows >= mine.start) & (visual_rows < mine.stop))
    return VisionInputs(
        patches_NP=torch.from_numpy(np.ascontiguousarray(padded[here])).to(device),
        positions_KN=positions_KN,
        here_KN=positions_KN[:, here],
        frames=Packed((*frames, pad) if pad else frames),
        windows=Packed((*windows, pad) if pad else windows) if windows else None,
        media=media,
        rows_M=torch.from_numpy(visual_rows[chosen] - mine.start).to(device),
        picks_CM=layout.picks_CV[:, chosen].to(device),
        weights_CM=None if layout.weights_CV is None else layout.weights_CV[:, chosen].to(device),
    )
