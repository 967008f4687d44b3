"""M-RoPE position ids with absolute time, and how patch rows lie window by window (arXiv 2502.13923 §2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from tetrascope.models.layers.mrope import VisualRun, mrope_ids
from tetrascope.models.layers.positions import Draw
from tetrascope.models.media import Media, VisionLayout
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig
from tetrascope.models.qwen2_5_vl.windows import video_order
from tetrascope.models.qwen2_vl.positions import patch_positions


def positions(config: Qwen2_5VLConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[3, T]` of one sample; nothing about them is random.

    Frames of a video are as far apart as in time, see `time_steps`. Raises UserError when the visual tokens do not
    match the media.
    """
    merge = config.vision.merge
    visual_T = (ids_T == config.image_token_id) | (ids_T == config.video_token_id)
    runs = [VisualRun(time_steps(config, one), one.grid[1] // merge, one.grid[2] // merge) for one in media]
    return mrope_ids(visual_T, runs, config.position_rule)


def time_steps(config: Qwen2_5VLConfig, media: Media) -> list[int]:
    """Temporal position of every frame of the grid: floor(frame · tokens_per_second · seconds per frame).

    In whole numbers throughout. transformers multiplies in fp32 (qwen2_5_vl/modeling_qwen2_5_vl.py, `get_rope_index`),
    where a product that should be a whole number can come out below it and lose one.
    """
    t, _, _, numerator, denominator = media.grid
    return [i * config.vision.tokens_per_second * numerator // denominator for i in range(t)]


def seconds_per_step(frames: int, fps: float, chosen: int, temporal_patch: int) -> Fraction:
    """Seconds from one temporal step of a video to the next, when `chosen` of its frames are taken: exact.

    temporal_patch / sampled_fps with sampled_fps = chosen / frames · fps (transformers' `VideoMetadata.sampled_fps`;
    qwen-vl-utils' sample_fps). fps is the nearest double of a ratio of integers, such as 30000/1001, which is found
    again: two ratios with denominators up to 10^6 differ by at least 10^-12, far more than a double's rounding.
    """
    return Fraction(temporal_patch * frames, chosen) / Fraction(fps).limit_denominator(10**6)


def vision_layout(config: Qwen2_5VLConfig, media: Sequence[Media]) -> VisionLayout:
    """Row and column of every patch, int64 `[2, N]`, window by window; tokens in the order of the picture."""
    v = config.vision
    picks, places, first = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)], 0
    for one in media:
        order = feature_order(config, one)
        picks.append(first + np.argsort(order))
        places.append(patch_rows(first + order, v.merge**2))
        first += len(order)
    rows_N, picks_V = torch.from_numpy(np.concatenate(places)), torch.from_numpy(np.concatenate(picks))
    return VisionLayout(patch_positions(v.merge, media)[:, rows_N], picks_V[None])


def feature_order(config: Qwen2_5VLConfig, media: Media) -> np.ndarray:
    """The merged patches of an image or video in the order of the encoder, as numbers in the order of the picture."""
    v = config.vision
    t, h, w = media.grid[:3]
    return video_order(t, h // v.merge, w // v.merge, v.window_side)


def patch_rows(features: np.ndarray, patches: int) -> np.ndarray:
    """The patch rows of merged patches, `patches` of them each."""
    return (features[:, None] * patches + np.arange(patches)).reshape(-1)
