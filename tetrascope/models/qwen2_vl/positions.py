"""M-RoPE position ids of a sample, and patch positions of its images (arXiv 2409.12191 §2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tetrascope.models.layers.mrope import VisualRun, mrope_ids
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
    t, h, w = media.grid[:3]
    return t, h, w


def mrope_positions(config: Qwen2VLConfig, ids_T: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Position ids int64 `[3, T]` (temporal, height, width) of one sample; frames are one position apart.

    See `mrope_ids`; `position_rule` is its rule. Raises UserError when the visual tokens do not match the grids.
    """
    merge = config.vision.merge
    visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
    runs = [VisualRun(range(t), h // merge, w // merge) for t, h, w in grids]
    return mrope_ids(visual_T, runs, config.position_rule)


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
