"""From pictures and videos to Qwen2.5-VL's patch rows: Qwen2-VL's, ordered window by window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tetrascope.models.media import Media, MediaOptions
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig, media
from tetrascope.models.qwen2_5_vl.positions import feature_order, patch_rows, seconds_per_step
from tetrascope.models.qwen2_vl.positions import as_grid
from tetrascope.models.qwen2_vl.preprocess import Qwen2VLMedia


class Qwen2_5VLMedia(Qwen2VLMedia):
    """Native dynamic resolution and video sampling of Qwen2-VL, whose image processor Qwen2.5-VL uses too."""

    def __init__(self, config: Qwen2_5VLConfig, options: MediaOptions) -> None:
        super().__init__(config, options)
        self._config = config

    def image(self, width: int, height: int, images: int) -> Media:
        """Raises UserError for an aspect ratio above 200 and for no pixels at all."""
        one = super().image(width, height, images)
        return media("image", as_grid(one), self._config.vision, size=one.size)

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """Raises UserError for fewer frames than a temporal patch has, and for an aspect ratio above 200."""
        one, shape = super().video(frames, fps, width, height), self._config.vision
        step = seconds_per_step(frames, fps, len(one.numbers), shape.temporal_patch)
        return media("video", as_grid(one), shape, step, numbers=one.numbers, times=one.times, size=one.size)

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[t·h·w, P]`."""
        order = feature_order(self._config, of)
        rows: np.ndarray = super().rows(pictures, of)[patch_rows(order, self._config.vision.merge**2)]
        return rows
