"""From pictures and videos to LongVILA's patch rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tetrascope.models.layers.frames import check_rate, vila_frames
from tetrascope.models.layers.tiles import check_size, patchify, rgb
from tetrascope.models.longvila.config import LongVilaConfig, clip, picture
from tetrascope.models.media import Media, MediaOptions

MEDIA_OPTIONS = frozenset(("fps", "max_frames"))

MEAN = STD = [0.5, 0.5, 0.5]
"""Of SigLIP's published preprocessor_config.json, and the defaults of transformers' class."""


class LongVilaMedia:
    """Every picture and every frame is stretched to one square view by SigLIP's processor (`image_aspect_ratio:
    resize`, the default of VILA's recipes).

    A video gives `max_frames` frames from the first to the last, or all that it has (VILA, llava/utils/media.py, where
    a video of fewer shows some of them twice). With `fps`, as many as its seconds ask for, two at least, up to
    `max_frames` (llava/mm_utils.py of LongVILA's release, `get_frame_from_vcap_with_fps`).
    """

    def __init__(self, config: LongVilaConfig, options: MediaOptions) -> None:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        side = config.vision.image
        self._config, self._fps = config, options.fps
        self._max_frames = options.max_frames or config.frames
        self._processor = SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=MEAN, image_std=STD)

    def image(self, width: int, height: int, images: int) -> Media:
        """Raises UserError for no pixels at all."""
        check_size(width, height)
        return picture(self._config, (width, height))

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """Raises UserError for a video without frames or pixels, and for a rate that is not positive."""
        check_rate(fps)
        check_size(width, height)
        most = min(self._max_frames, max(1, frames))
        if self._fps is not None:
            most = min(most, max(2, math.floor(frames / fps * self._fps)))
        numbers = tuple(vila_frames(frames, most))
        return clip(self._config, numbers, tuple(n / fps for n in numbers), (width, height))

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[views · side², P]`, patches row by row. Pixels beyond the last whole patch are not looked at
        (384 = 27 · 14 + 6)."""
        v = self._config.vision
        seen = v.side * v.patch
        views = [
            np.asarray(self._processor(rgb(one), return_tensors="np")["pixel_values"], dtype=np.float32)
            for one in pictures
        ]
        return patchify(np.concatenate(views)[:, :, :seen, :seen], v.patch)

    def save(self, folder: str) -> None:
        """Writes vision_tower/preprocessor_config.json, where VILA has it."""
        tower = Path(folder, "vision_tower")
        tower.mkdir(parents=True, exist_ok=True)
        self._processor.save_pretrained(str(tower))
