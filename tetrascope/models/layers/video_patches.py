"""Video frames to the patch rows of the Qwen families, in numpy and Pillow.

transformers' video processors need torchvision, so their geometry is written out here. One difference: the resize is
Pillow's BICUBIC on 8-bit pixels, the same as for images, where theirs is torchvision's antialiased bicubic.

| | patch | size bounds (pixels) | bounds apply to |
|---|---|---|---|
| Qwen2-VL, Qwen2.5-VL | 14 | 128·28² to 768·28² | a frame: `frame_size` |
| Qwen3-VL | 16 | 128·32² to 768·32² | all frames together: `video_size` |

These are the defaults of transformers' classes; a checkpoint's video_preprocessor_config.json may have others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.layers.frames import qwen_frame_pixels
from tetrascope.models.layers.tiles import BICUBIC, normalized, rgb

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200


def frame_size(
    width: int,
    height: int,
    *,
    factor: int = 28,
    min_pixels: int = 128 * 28 * 28,
    max_pixels: int = 768 * 28 * 28,
) -> tuple[int, int]:
    """(height, width) after resizing a frame by itself: multiples of `factor`, area within the bounds, aspect kept.

    Source: Qwen2-VL's smart_resize (transformers `video_processing_qwen2_vl.py`, the same as for images). Halves round
    to even. Raises UserError for an aspect ratio above 200 or no pixels.
    """
    return _bounded(1, width, height, 1, factor, min_pixels, max_pixels)


def video_size(
    frames: int,
    width: int,
    height: int,
    *,
    factor: int = 32,
    temporal_patch: int = 2,
    min_pixels: int = 128 * 32 * 32,
    max_pixels: int = 768 * 32 * 32,
) -> tuple[int, int]:
    """(height, width) after resizing, with bounds on frames · height · width: many frames make each of them smaller.

    A frame smaller than one merged patch is first enlarged. Source: Qwen3-VL's smart_resize (transformers
    `video_processing_qwen3_vl.py`). Raises UserError for fewer than `temporal_patch` frames, an aspect ratio above 200
    or no pixels.
    """
    if frames < temporal_patch:
        raise UserError(f"a video has {frames} frames, at least {temporal_patch} are needed; leave it out of the data")
    if min(width, height) > 0 and (height < factor or width < factor):
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    return _bounded(frames, width, height, temporal_patch, factor, min_pixels, max_pixels)


def _bounded(
    frames: int, width: int, height: int, temporal_patch: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    if width < 1 or height < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"a video's frames have {width}x{height} pixels, expected sides that differ by at most {MAX_ASPECT} times; "
            "leave it out of the data"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    # The rounded frame count decides whether a bound is broken, the real one by how much: as the original does.
    area = round(frames / temporal_patch) * temporal_patch * new_height * new_width
    if area > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def patchify_video(frames: np.ndarray, patch: int, merge: int = 2, temporal_patch: int = 2) -> np.ndarray:
    """float32 `[T, C, H, W]` -> rows `[t·h·w, C·temporal_patch·patch·patch]`, grid (t, h, w) in patches.

    Rows are ordered (t, block row, block column, row in block, column in block) with blocks of merge x merge patches; a
    row's contents (C, frame, row, column). The last frame is repeated until T is a multiple of `temporal_patch`.
    Source: transformers `video_processing_qwen2_vl.py`, `patchify`.
    """
    n, channels, height, width = frames.shape
    if n < 1:
        raise UserError("a video has no frames, at least 1 is needed; leave it out of the data")
    if height % (patch * merge) or width % (patch * merge):
        raise UserError(f"frames have {width}x{height} pixels, expected multiples of {patch * merge}")
    if missing := -n % temporal_patch:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    t, rows, columns = len(frames) // temporal_patch, height // (patch * merge), width // (patch * merge)
    cut = frames.reshape(t, temporal_patch, channels, rows, merge, patch, columns, merge, patch)
    #          t, block row, block column, row and column in the block, C, frame, and the pixel's row and column
    ordered = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return np.ascontiguousarray(ordered).reshape(-1, channels * temporal_patch * patch * patch)


@dataclass(frozen=True)
class VideoPatches:
    """Frames to patch rows for one Qwen family; the defaults are Qwen2-VL's and Qwen2.5-VL's.

    bounds: "frame" (min_pixels and max_pixels are of one frame; Qwen2-VL, Qwen2.5-VL) or "video" (of all frames
    together; Qwen3-VL). total_pixels: with "frame", the whole video's budget (see `frames.qwen_frame_pixels`), None for
    none, which is what transformers does by default.
    """

    patch: int = 14
    merge: int = 2
    temporal_patch: int = 2
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    bounds: Literal["frame", "video"] = "frame"
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    total_pixels: int | None = None

    def size(self, frames: int, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the resized frames. Raises UserError as `frame_size` and `video_size` do."""
        factor = self.patch * self.merge
        if self.bounds == "video":
            return video_size(
                frames,
                width,
                height,
                factor=factor,
                temporal_patch=self.temporal_patch,
                min_pixels=self.min_pixels,
                max_pixels=self.max_pixels,
            )
        high = self.max_pixels
        if self.total_pixels is not None:
            high = qwen_frame_pixels(
                frames,
                min_pixels=self.min_pixels,
                max_pixels=high,
                total_pixels=self.total_pixels,
                temporal_patch=self.temporal_patch,
            )
        return frame_size(width, height, factor=factor, min_pixels=self.min_pixels, max_pixels=high)

    def grid(self, frames: int, width: int, height: int) -> tuple[int, int, int]:
        """(t, h, w) in patches, from sizes alone."""
        new_height, new_width = self.size(frames, width, height)
        return -(-frames // self.temporal_patch), new_height // self.patch, new_width // self.patch

    def patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """float32 rows `[t·h·w, 3·temporal_patch·patch²]` of frames of one size."""
        if not frames:
            raise UserError("a video has no frames, at least 1 is needed; leave it out of the data")
        height, width = self.size(len(frames), frames[0].width, frames[0].height)
        resized = [rgb(frame).resize((width, height), BICUBIC) for frame in frames]
        return patchify_video(normalized(resized, self.mean, self.std), self.patch, self.merge, self.temporal_patch)
