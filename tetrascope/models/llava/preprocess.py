"""From pictures to LLaVA-1.5's patch rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.layers.tiles import pad_to_square, patchify, rgb
from tetrascope.models.llava.config import LlavaConfig, media
from tetrascope.models.media import Media, MediaOptions

MAX_ASPECT = 200
"""Longer side by shorter. Beyond, a picture would be blown up to gigabytes of pixels, nearly all cut off again."""


class LlavaMedia:
    """Every picture becomes one square view, through transformers' own CLIP processor.

    `aspect: crop` resizes the shorter side and cuts out the middle (llava-hf's preprocessor_config.json, and the
    original's stage 1); `pad` first centres the picture on a square of CLIP's mean colour (the original's stage 2).
    """

    def __init__(self, config: LlavaConfig, options: MediaOptions) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self._config, self._pad = config, config.aspect == "pad"
        self._processor = CLIPImageProcessorPil(**self._size())
        self._mean: Sequence[float] = self._processor.image_mean

    def _size(self) -> dict[str, Any]:
        side = self._config.vision.image
        return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}

    def image(self, width: int, height: int, images: int) -> Media:
        """Raises UserError for no pixels at all and for an aspect ratio above 200."""
        if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
            raise UserError(
                f"image of {width}x{height} pixels: expected at least 1x1 and an aspect ratio of at most {MAX_ASPECT}; "
                "leave it out of the data"
            )
        return media(self._config.vision, (width, height))

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """Raises UserError: LLaVA-1.5 has no videos."""
        raise UserError("llava takes no videos; give their frames as images, or use another family")

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[rows, P]`: a row of zeros for the class token, then the patches row by row."""
        picture = rgb(pictures[0])
        if self._pad:
            picture = pad_to_square(picture, self._mean)
        pixels = np.asarray(self._processor(picture, return_tensors="np")["pixel_values"], dtype=np.float32)
        patches = patchify(pixels, self._config.vision.patch)
        return np.concatenate([np.zeros_like(patches[:1]), patches])

    def save(self, folder: str) -> None:
        """Writes preprocessor_config.json: CLIP's processor, or LLaVA's, which can pad."""
        if not self._pad:
            self._processor.save_pretrained(folder)
            return
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        LlavaImageProcessorPil(**self._size(), do_pad=True).save_pretrained(folder)
