"""From a picture to Qwen2-VL's patch rows, with transformers' own image processor (the one without torchvision)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig


class Qwen2VLImages:
    """Native dynamic resolution: sides rounded to whole merged patches, area kept within [min, max] pixels."""

    def __init__(self, config: Qwen2VLConfig, min_pixels: int, max_pixels: int) -> None:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

        v = config.vision
        self._smart_resize = hf.smart_resize
        self._processor = hf.Qwen2VLImageProcessorPil(
            patch_size=v.patch,
            temporal_patch_size=v.temporal_patch,
            merge_size=v.merge,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        self._factor, self._patch = v.patch * v.merge, v.patch
        self._min, self._max = min_pixels, max_pixels

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """(1, patch rows, patch columns). Raises UserError for an aspect ratio above 200 and for no pixels at all."""
        try:
            h, w = self._smart_resize(height, width, factor=self._factor, min_pixels=self._min, max_pixels=self._max)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"image of {width}x{height} pixels: {error}") from error
        return 1, h // self._patch, w // self._patch

    def patches(self, image: Image.Image) -> np.ndarray:
        """float32 `[h·w, P]`."""
        out = self._processor(image, return_tensors="np")
        return np.ascontiguousarray(out["pixel_values"], dtype=np.float32)

    def save(self, folder: str) -> None:
        """Writes preprocessor_config.json."""
        self._processor.save_pretrained(folder)
