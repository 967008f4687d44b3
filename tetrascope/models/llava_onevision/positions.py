"""Position ids of a sample, and how the features of a micro-batch become tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tetrascope.models.layers.positions import Draw, linear_positions
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig
from tetrascope.models.llava_onevision.views import layout
from tetrascope.models.media import Media, VisionLayout


def positions(config: LlavaOneVisionConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[1, T]` of one sample, in 1/256 of a token; newlines count as visual tokens.

    Raises UserError when the visual tokens do not match the media.
    """
    visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
    return linear_positions(visual_T, [one.tokens for one in media], config.positions, draw)


def vision_layout(config: LlavaOneVisionConfig, media: Sequence[Media]) -> VisionLayout:
    """Places in the position table, int64 `[1, N]`, and the assembly that views.py describes."""
    return layout(config.vision, config.max_views, media)
