"""From pictures and videos to Qwen3-VL's patch rows.

Images go through transformers' own processor (the one without torchvision), which is Qwen2-VL's with other numbers;
its video processor needs torchvision, so videos go through layers/video_patches.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.layers.frames import qwen3_frames
from tetrascope.models.layers.video_patches import VideoPatches
from tetrascope.models.media import Media, MediaOptions
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig

MEAN = STD = (0.5, 0.5, 0.5)

CELL = 32 * 32
"""Pixels of a visual token, of the published models."""

MIN_PIXELS, MAX_PIXELS = 64 * CELL, 16384 * CELL
"""Default area of an image (preprocessor_config.json of Qwen/Qwen3-VL-8B-Instruct)."""

VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 4 * CELL, 24576 * CELL
"""Default area of all frames of a video together (video_preprocessor_config.json of Qwen/Qwen3-VL-8B-Instruct)."""

FRAME_PIXELS = 768 * CELL
"""Default of the largest area of a frame, however few of them there are (qwen-vl-utils, vision_process.py)."""

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
"""Frames taken a second, at least and at most (transformers, `video_processing_qwen3_vl.py`)."""

MEDIA_OPTIONS = frozenset(("min_pixels", "max_pixels", "fps", "min_frames", "max_frames", "video_max_pixels"))


class Qwen3VLMedia:
    """Native dynamic resolution: sides rounded to whole merged patches, area kept within [min, max] pixels.

    The bounds of a video are those of all its frames together, so that many frames make each of them smaller; besides,
    a frame has at most `video_max_pixels` (what transformers calls `cap_pixels_per_frame`).
    """

    def __init__(self, config: Qwen3VLConfig, options: MediaOptions) -> None:
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
            image_mean=list(MEAN),
            image_std=list(STD),
        )
        self._vision, self._options = v, options
        self._frame_pixels = options.video_max_pixels or FRAME_PIXELS
        self._video = VideoPatches(
            patch=v.patch,
            merge=v.merge,
            temporal_patch=v.temporal_patch,
            mean=MEAN,
            std=STD,
            bounds="video",
            min_pixels=VIDEO_MIN_PIXELS,
            max_pixels=VIDEO_MAX_PIXELS,
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
        numbers = qwen3_frames(
            frames,
            fps,
            fps=chosen.fps or FPS,
            min_frames=chosen.min_frames or MIN_FRAMES,
            max_frames=chosen.max_frames or MAX_FRAMES,
        )
        grid = self._sized(len(numbers)).grid(len(numbers), width, height)
        times = step_times(numbers, fps, v.temporal_patch)
        return media("video", grid, v.merge, numbers=tuple(numbers), times=times, size=(width, height))

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[t·h·w, P]`."""
        if of.kind == "video":
            return self._sized(len(pictures)).patches(pictures)
        out = self._processor(pictures[0], return_tensors="np")
        return np.ascontiguousarray(out["pixel_values"], dtype=np.float32)

    def save(self, folder: str) -> None:
        """Writes preprocessor_config.json, and video_preprocessor_config.json with the bounds of videos."""
        self._processor.save_pretrained(folder)
        v, chosen = self._vision, self._options
        video: dict[str, Any] = {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": VIDEO_MIN_PIXELS, "longest_edge": VIDEO_MAX_PIXELS},
            "cap_pixels_per_frame": True,
            "max_video_tokens": self._frame_pixels // (v.patch * v.merge) ** 2,
            "patch_size": v.patch,
            "temporal_patch_size": v.temporal_patch,
            "merge_size": v.merge,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "fps": chosen.fps or FPS,
            "min_frames": chosen.min_frames or MIN_FRAMES,
            "max_frames": chosen.max_frames or MAX_FRAMES,
        }
        path = Path(folder) / "video_preprocessor_config.json"
        path.write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")

    def _sized(self, frames: int) -> VideoPatches:
        """The bounds for a video of so many frames (transformers, `video_processing_qwen3_vl.py`, `resize`)."""
        own = max(min(self._frame_pixels, VIDEO_MAX_PIXELS // frames), int(VIDEO_MIN_PIXELS * 1.05))
        return replace(self._video, max_pixels=own * frames)


def step_times(numbers: Sequence[int], fps: float, temporal_patch: int) -> tuple[float, ...]:
    """Seconds of each temporal step: the middle between its first and its last frame.

    The last frame is repeated until the steps are whole (transformers, `processing_qwen3_vl.py`,
    `_calculate_timestamps`).
    """
    seconds = [n / fps for n in numbers]
    seconds += [seconds[-1]] * (-len(seconds) % temporal_patch)
    firsts, lasts = seconds[::temporal_patch], seconds[temporal_patch - 1 :: temporal_patch]
    return tuple((first + last) / 2 for first, last in zip(firsts, lasts, strict=True))
