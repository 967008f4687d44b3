"""Position ids of a sample, and which rows of the encoder become visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tetrascope.models.layers.positions import Draw, linear_positions
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.media import Media, VisionLayout


def positions(config: LongVilaConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[1, T]` of one sample, in units of 1/256 of a token (layers/positions.py).

    To V2PE each frame of a video is an image of its own: a newline token stands between them.
    """
    runs = [config.side**2] * sum(len(one.frames) for one in media)
    return linear_positions(ids_T == config.image_token_id, runs, config.positions, draw)


def vision_layout(config: LongVilaConfig, media: Sequence[Media]) -> VisionLayout:
    """Every frame alike: its rows have the places of the position table in order, its features become tokens row by
    row, or column by column (`token_order`)."""
    frames, rows = sum(len(one.frames) for one in media), config.vision.rows
    features = torch.arange(frames * config.side**2).view(frames, config.side, config.side)
    if config.token_order == "columns":
        features = features.transpose(1, 2)
    return VisionLayout(torch.arange(rows).repeat(frames)[None], features.reshape(1, -1))
