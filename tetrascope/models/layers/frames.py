"""Which frames of a video a model sees: pure functions of the frame count and rate, one for each family's rule.

All take the number of frames in the video and return ascending frame numbers from 0. A rule may name a frame twice
where a video has barely enough of them (`internvl_frames`, as its original does). A video with fewer frames than asked
is refused with UserError: nothing is padded with black, as some originals do.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from tetrascope.errors import UserError


def _enough(total: int, needed: int) -> None:
    if needed < 1:
        raise UserError(f"{needed} frames were asked for, expected at least 1; correct the number of frames")
    if total < needed:
        raise UserError(
            f"a video has {total} frames, at least {needed} are needed; "
            "leave it out of the data or ask for fewer frames"
        )


def check_rate(fps: float, name: str = "the video's frame rate") -> None:
    """Raises UserError for a rate that is not a positive number."""
    if not (fps > 0 and math.isfinite(fps)):
        raise UserError(f"{name} is {fps}, expected a positive number of frames per second")


def uniform_frames(total: int, n: int) -> list[int]:
    """`n` frames evenly from the first to the last, rounded down."""
    _enough(total, n)
    return np.linspace(0, total - 1, n, dtype=int).tolist()


def nearest_uniform_frames(total: int, n: int) -> list[int]:
    """`n` frames evenly from the first to the last, rounded to the nearest (half to even, as numpy and torch do)."""
    _enough(total, n)
    return np.linspace(0, total - 1, n).round().astype(int).tolist()


# --- Qwen2-VL, Qwen2.5-VL, Qwen3-VL


def qwen_frame_count(
    total: int,
    video_fps: float,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    temporal_patch: int = 2,
) -> int:
    """How many frames: total / video_fps · fps, within [min_frames, min(max_frames, total)], a multiple of the patch.

    Rounded down, and so is the upper bound. Source: qwen-vl-utils `vision_process.py`, `smart_nframes`; the same number
    as transformers' `video_processing_qwen2_vl.py`, `sample_frames`. Raises UserError for fewer than `temporal_patch`
    frames; a video with fewer than `min_frames` gives what it has (the originals' behaviour).
    """
    _enough(total, temporal_patch)
    check_rate(video_fps)
    check_rate(fps, "fps")
    upper = min(max_frames, total) // temporal_patch * temporal_patch
    n = min(max(total / video_fps * fps, min_frames), upper)
    return math.floor(n / temporal_patch) * temporal_patch


def qwen_frames(
    total: int,
    video_fps: float,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    rule: Literal["qwen-vl-utils", "hf"] = "qwen-vl-utils",
) -> list[int]:
    """The frames for Qwen2-VL and Qwen2.5-VL: `qwen_frame_count` of them.

    rule "qwen-vl-utils": round(linspace(0, total − 1, n)), first and last frame included.
    rule "hf": int(arange(0, total, total / n)) in float32, from transformers' `video_processing_qwen2_vl.py`. There,
    rounding can give an (n+1)-th number equal to `total` (17 frames, n = 14), a frame that does not exist: we keep n.
    """
    n = qwen_frame_count(total, video_fps, fps=fps, min_frames=min_frames, max_frames=max_frames)
    if rule == "hf":
        return torch.arange(0, total, total / n).int()[:n].tolist()
    return nearest_uniform_frames(total, n)


def qwen3_frames(
    total: int, video_fps: float, *, fps: float = 2.0, min_frames: int = 4, max_frames: int = 768
) -> list[int]:
    """The frames for Qwen3-VL: round(linspace(0, total − 1, n)) with n not rounded to even.

    n = int(total / video_fps · fps) within [min_frames, max_frames] and at most `total`; the patchifier repeats the
    last frame of an odd number. Source: transformers' `video_processing_qwen3_vl.py`, `sample_frames`.
    """
    _enough(total, 1)
    check_rate(video_fps)
    check_rate(fps, "fps")
    return nearest_uniform_frames(total, min(max(int(total / video_fps * fps), min_frames), max_frames, total))


def qwen_frame_pixels(
    frames: int,
    *,
    min_pixels: int = 128 * 28 * 28,
    max_pixels: int = 768 * 28 * 28,
    total_pixels: int = 24576 * 28 * 28,
    temporal_patch: int = 2,
) -> int:
    """The most pixels a frame may have: an even share of the video's budget, within [1.05 · min_pixels, max_pixels].

    The lower bound wins over both others. Pixels of the resized frame; 784 of them are one visual token in each group
    of `temporal_patch` frames. Source: qwen-vl-utils `vision_process.py`, `fetch_video`. The Qwen2-VL paper (arXiv
    2409.12191) trained with total_pixels = 16384 · 784.
    """
    _enough(frames, 1)
    return int(max(min(max_pixels, total_pixels / frames * temporal_patch), int(min_pixels * 1.05)))


# --- LLaVA-OneVision


def onevision_frames(total: int, video_fps: float, *, fps: float = 1.0, max_frames: int = 32) -> list[int]:
    """Every round(video_fps / fps)-th frame from the first; if these are more than `max_frames`, that many uniformly.

    Source: LLaVA-NeXT `llava/utils.py`, `process_video_with_decord`. A video slower than fps gives every frame once
    (the original's step would be 0, an error).
    """
    _enough(total, 1)
    check_rate(video_fps)
    check_rate(fps, "fps")
    numbers = list(range(0, total, max(1, round(video_fps / fps))))
    return numbers if len(numbers) <= max_frames else uniform_frames(total, max_frames)


# --- InternVL


def internvl_frames(total: int, n: int, *, rule: Literal["segments", "intervals", "hf"] = "segments") -> list[int]:
    """One frame from the middle of each of `n` equal segments.

    rule "segments": int(s/2 + round(s·i)), s = (total − 1)/n; the model cards' `get_index`, for a fixed number of
    segments. Names a frame twice where total is close to n (total = n = 4 gives 0, 1, 2, 2).
    rule "intervals": the borders are int(linspace(0, total, n + 1)), the frame is (first + last) // 2 of each; the
    training code's "middle" sampling (`internvl/train/dataset.py`, `get_frame_indices`).
    rule "hf": int(i·total/n + total/(2n)) in float32; transformers' `video_processing_internvl.py`.
    """
    _enough(total, n)
    if rule == "hf":
        step = total / n
        return torch.arange(step / 2, total, step).int()[:n].tolist()
    if rule == "intervals":
        borders = np.linspace(0, total, n + 1).astype(int).tolist()
        return [(first + after - 1) // 2 for first, after in pairwise(borders)]
    size = (total - 1) / n
    return [int(size / 2 + np.round(size * i)) for i in range(n)]


# --- VILA, LongVILA


def vila_frames(total: int, n: int, *, rule: Literal["media", "opencv"] = "media") -> list[int]:
    """`n` frames uniformly.

    rule "media": round(linspace(0, total − 1, n)), VILA's `llava/utils/media.py`.
    rule "opencv": int(linspace(0, total − 2, n)), VILA's `llava/mm_utils.py`, `get_frame_from_vcap`: never the last
    frame, since OpenCV's count is often one too many, so it needs n + 1 frames.
    """
    if rule == "opencv":
        _enough(total, n + 1)
        return uniform_frames(total - 1, n)
    return nearest_uniform_frames(total, n)
