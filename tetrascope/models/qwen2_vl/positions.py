"""M-RoPE position ids of a sample, and patch positions of its images (arXiv 2409.12191 §2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tetrascope.errors import UserError
from tetrascope.models.layers.positions import Draw
from tetrascope.models.media import Media, VisionLayout
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig

Grid = tuple[int, int, int]
"""Frames, patch rows and patch columns of an image or a video."""


def positions(config: Qwen2VLConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[3, T]` of one sample; nothing about them is random."""
    return mrope_positions(config, ids_T, [as_grid(one) for one in media])


def as_grid(media: Media) -> Grid:
    """Frames, patch rows and patch columns."""
    t, h, w = media.grid
    return t, h, w


def mrope_positions(config: Qwen2VLConfig, ids_T: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Position ids int64 `[3, T]` (temporal, height, width) of one sample.

    A text token has one position on all axes. A visual token at (t, row, column) of its merged grid has the position
    of the run's start plus (t, row, column). What follows a visual run starts after the run's largest position
    (`position_rule: paper`, also the original implementation), or after max(rows, columns) whatever the number of
    frames (`hf`: transformers 5). The two differ for videos with more merged frames than rows and columns.

    Raises UserError when the visual tokens do not match the grids.
    """
    merge = config.vision.merge
    visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
    positions = np.empty((3, len(ids_T)), dtype=np.int64)
    row, position = 0, 0
    for t, h, w in grids:
        h, w = h // merge, w // merge
        text = int(visual_T[row:].argmax()) if visual_T[row:].any() else len(ids_T) - row
        positions[:, row : row + text] = position + np.arange(text)
        row, position = row + text, position + text
        count = t * h * w
        if row + count > len(ids_T) or not visual_T[row : row + count].all():
            raise UserError(f"sample: expected {count} visual tokens at token {row} for a {t}x{h}x{w} grid")
        positions[:, row : row + count] = position + np.indices((t, h, w)).reshape(3, count)
        row += count
        position += max(t, h, w) if config.position_rule == "paper" else max(h, w)
    if visual_T[row:].any():
        raise UserError(f"sample: {int(visual_T[row:].sum())} visual tokens belong to none of its {len(grids)} images")
    positions[:, row:] = position + np.arange(len(ids_T) - row)
    return positions


def vision_layout(config: Qwen2VLConfig, media: Sequence[Media]) -> VisionLayout:
    """Row and column of every patch, int64 `[2, N]`; features become tokens in order."""
    tokens = sum(one.tokens for one in media)
    return VisionLayout(patch_positions(config.vision.merge, media), torch.arange(tokens)[None])


def patch_positions(merge: int, media: Sequence[Media]) -> Tensor:
    """Row and column of every patch, int64 `[2, N]`.

    Patches lie in merge-block order: blocks row by row, inside a block row by row; every frame alike.
    """
    pieces = [np.empty((2, 0), dtype=np.int64)]
    for t, h, w in map(as_grid, media):
        plane = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
        pieces += [plane.transpose(0, 1, 3, 2, 4).reshape(2, h * w)] * t
    return torch.from_numpy(np.concatenate(pieces, axis=1))
