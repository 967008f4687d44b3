"""Position ids of a sample, and which rows of the encoder become visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tetrascope.models.layers.positions import Draw, linear_positions
from tetrascope.models.llava.config import LlavaConfig
from tetrascope.models.media import Media, VisionLayout


def positions(config: LlavaConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[1, T]` of one sample, in units of 1/256 of a token (layers/positions.py)."""
    return linear_positions(ids_T == config.image_token_id, [one.tokens for one in media], config.positions, draw)


def vision_layout(config: LlavaConfig, media: Sequence[Media]) -> VisionLayout:
    """Every image alike: place 0 is the class token's, places 1 … side² the patches', which alone become tokens."""
    rows = config.vision.rows
    places_MR = torch.arange(rows).expand(len(media), rows)
    features_MR = torch.arange(len(media) * rows).view(len(media), rows)
    return VisionLayout(places_MR.reshape(1, -1), features_MR[:, 1:].reshape(1, -1))
