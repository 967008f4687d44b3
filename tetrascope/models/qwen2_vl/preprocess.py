"""From pictures and videos to Qwen2-VL's patch rows.

Images go through transformers' own processor (the one without torchvision); its video processors need torchvision, so
videos go through layers/video_patches.py. Videos are sampled as qwen-vl-utils does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.layers.frames import qwen_frames
from tetrascope.models.layers.video_patches import VideoPatches
from tetrascope.models.media import Media, MediaOptions
from tetrascope.models.qwen2_vl.config import media

MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28
"""Default area of an image."""

MEDIA_OPTIONS = frozenset(("min_pixels", "max_pixels", "fps", "min_frames", "max_frames", "video_max_pixels"))

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
"""Frames taken a second, at least and at most (qwen-vl-utils, vision_process.py)."""

TOTAL_PIXELS = 24576 * 28 * 28
"""Budget of a video's frames, two frames to a temporal patch (qwen-vl-utils, vision_process.py)."""


class PatchShape(Protocol):
    """Pixels on a patch's side, frames in it, and patches on the side of a merged one."""

    @property
    def patch(self) -> int: ...
    @property
    def temporal_patch(self) -> int: ...
    @property
    def merge(self) -> int: ...


class HasPatches(Protocol):
    """The part of a configuration that decides what pictures become; Qwen2.5-VL has it too."""

    @property
    def vision(self) -> PatchShape: ...


class Qwen2VLMedia:
    """Native dynamic resolution: sides rounded to whole merged patches, area kept within [min, max] pixels."""

    def __init__(self, config: HasPatches, options: MediaOptions) -> None:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

        v = config.vision
        self._max = options.max_pixels or MAX_PIXELS
        self._min = options.min_pixels or min(MIN_PIXELS, self._max)
        if self._min > self._max:
            raise UserError(f"data.min_pixels: {self._min} is more than data.max_pixels={self._max}; lower it")
        self._smart_resize = hf.smart_resize
        self._processor = hf.Qwen2VLImageProcessorPil(
            patch_size=v.patch,
            temporal_patch_size=v.temporal_patch,
            merge_size=v.merge,
            min_pixels=self._min,
            max_pixels=self._max,
        )
        self._vision, self._options = v, options
        self._video = VideoPatches(
            patch=v.patch,
            merge=v.merge,
            temporal_patch=v.temporal_patch,
            max_pixels=options.video_max_pixels or 768 * 28 * 28,
            min_pixels=min(128 * 28 * 28, options.video_max_pixels or 768 * 28 * 28),
            total_pixels=TOTAL_PIXELS,
        )

    def image(self, width: int, height: int, images: int) -> Media:
        """Raises UserError for an aspect ratio above 200 and for no pixels at all."""
        v = self._vision
        factor = v.patch * v.merge
        try:
            h, w = self._smart_resize(height, width, factor=factor, min_pixels=self._min, max_pixels=self._max)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"image of {width}x{height} pixels: {error}") from error
        return media("image", (1, h // v.patch, w // v.patch), v.merge, size=(width, height))

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """Raises UserError for fewer frames than a temporal patch has, and for an aspect ratio above 200."""
        v, chosen = self._vision, self._options
        numbers = qwen_frames(
            frames,
            fps,
            fps=chosen.fps or FPS,
            min_frames=chosen.min_frames or MIN_FRAMES,
            max_frames=chosen.max_frames or MAX_FRAMES,
        )
        times = tuple(n / fps for n in numbers[:: v.temporal_patch])
        grid = self._video.grid(len(numbers), width, height)
        return media("video", grid, v.merge, numbers=tuple(numbers), times=times, size=(width, height))

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[t·h·w, P]`."""
        if of.kind == "video":
            return self._video.patches(pictures)
        out = self._processor(pictures[0], return_tensors="np")
        return np.ascontiguousarray(out["pixel_values"], dtype=np.float32)

    def save(self, folder: str) -> None:
        """Writes preprocessor_config.json."""
        self._processor.save_pretrained(folder)
