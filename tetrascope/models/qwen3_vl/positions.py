"""M-RoPE position ids of a sample, and what the encoder must know of every patch (arXiv 2511.21631 §2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tetrascope.models.layers.mrope import VisualRun, mrope_ids
from tetrascope.models.layers.positions import Draw
from tetrascope.models.media import Media, VisionLayout
from tetrascope.models.qwen2_vl.positions import as_grid, patch_positions
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig


def positions(config: Qwen3VLConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[3, T]` (temporal, height, width) of one sample; nothing about them is random.

    Each temporal step of a video counts as a picture of its own, since text (its time) stands between them: what
    follows it starts after max(rows, columns). So both rules of `mrope_ids` give the same numbers. Raises UserError
    when the visual tokens do not match the media.
    """
    merge = config.vision.merge
    visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
    runs = [VisualRun((0,), h // merge, w // merge) for t, h, w in map(as_grid, media) for _ in range(t)]
    return mrope_ids(visual_T, runs, "paper")


def vision_layout(config: Qwen3VLConfig, media: Sequence[Media]) -> VisionLayout:
    """Row and column of every patch, and rows and columns of its picture, int64 `[4, N]`; features become tokens in
    order."""
    sizes = [np.repeat([[h], [w]], t * h * w, axis=1) for t, h, w in map(as_grid, media)]
    sizes_2N = torch.from_numpy(np.concatenate([np.empty((2, 0), dtype=np.int64), *sizes], axis=1))
    positions_4N = torch.cat((patch_positions(config.vision.merge, media), sizes_2N))
    return VisionLayout(positions_4N, torch.arange(sum(one.tokens for one in media))[None])
