"""What an image or a video becomes: its views, and which of their features become which tokens.

The encoder and the adaptor see views only: the base view and crops of an image, or the frames of a video, each
`side`² features. Everything else that LLaVA-OneVision does with them (arXiv 2408.03326 §3.1 and figure 2) is written
here as data: token = weighted sum of features, by index and weight.

- image, AnyRes: features of the base view and the crops, row by row. Tokens: the base view; then the crops as one map
  without the borders, shrunk bilinearly if it is large, a newline after each row.
- image among several: features of one view, padded to a square. Tokens: these, then a newline.
- video: features of all frames. Tokens: each frame shrunk bilinearly to half its side; one newline at the end.

Shape suffixes: C features a token is made of, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tetrascope.models.layers.tiles import anyres_grid, anyres_tokens, downsampled, unpad_crop
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.media import Media, VisionLayout

Pinpoints = Sequence[tuple[int, int]]
"""Canvases (height, width) that the crops of an image may fill."""

NEWLINE = -1
"""Stands for the newline vector while features are still counted within one image."""

SINGLE = (0, 0)
"""`Media.grid` of an image that has one view only."""


def anyres_media(vision: ViTShape, pinpoints: Pinpoints, max_views: int, width: int, height: int) -> Media:
    """An image as base view and crops; `grid` is rows and columns of crops.

    Raises UserError for a size that no canvas of `pinpoints` can hold.
    """
    rows, columns = anyres_grid(width, height, pinpoints, vision.image)
    views = 1 + rows * columns
    tokens = anyres_tokens(width, height, pinpoints, crop=vision.image, side=vision.side, max_views=max_views)
    frames = (vision.rows,) * views
    return Media("image", (rows, columns), frames, views * vision.rows, tokens, size=(width, height))


def single_media(vision: ViTShape, newline: bool, width: int, height: int) -> Media:
    """An image as one view, with or without a newline after it."""
    return Media("image", SINGLE, (vision.rows,), vision.rows, vision.rows + newline, size=(width, height))


def video_media(
    vision: ViTShape, numbers: tuple[int, ...], times: tuple[float, ...] = (), size: tuple[int, int] = (0, 0)
) -> Media:
    """The frames `numbers` of a video; `grid` is their number and the side that each is pooled to."""
    frames, side = len(numbers), pooled(vision.side)
    return Media(
        "video",
        (frames, side, side),
        (vision.rows,) * frames,
        features=frames * vision.rows,
        tokens=frames * side**2 + 1,
        numbers=numbers,
        times=times,
        size=size,
    )


def pooled(side: int) -> int:
    """The side of a video frame after pooling (arXiv 2408.03326: 729 to 196 features a frame)."""
    return math.ceil(side / 2)


def layout(vision: ViTShape, max_views: int, media: Sequence[Media]) -> VisionLayout:
    """Places in the position table, int64 `[1, N]`, and which features of the micro-batch become which tokens.

    C is 4 where anything is shrunk, else 1, without weights.
    """
    total = sum(one.features for one in media)
    picks, weights, offset = [np.empty((4, 0), dtype=np.int64)], [np.empty((4, 0), dtype=np.float32)], 0
    for one in media:
        own_CV, own_weights_CV = tokens_of(vision.side, max_views, one)
        picks.append(np.where(own_CV == NEWLINE, total, own_CV + offset))
        weights.append(own_weights_CV)
        offset += one.features
    picks_CV, weights_CV = np.concatenate(picks, axis=1), np.concatenate(weights, axis=1)
    places_N = np.tile(np.arange(vision.rows), sum(len(one.frames) for one in media))
    positions_KN = torch.from_numpy(places_N[None])
    if not weights_CV[1:].any():
        return VisionLayout(positions_KN, torch.from_numpy(picks_CV[:1].copy()))
    return VisionLayout(positions_KN, torch.from_numpy(picks_CV), torch.from_numpy(weights_CV))


def tokens_of(side: int, max_views: int, one: Media) -> tuple[np.ndarray, np.ndarray]:
    """Picks int64 `[4, V]` and weights float32 `[4, V]` of one image or video; features counted from 0, or NEWLINE."""
    newline = np.full((4, 1), NEWLINE), np.array([[1], [0], [0], [0]], dtype=np.float32)
    if one.kind == "video":
        frames = np.arange(one.features).reshape(-1, side, side)
        shrunk = [shrink(frame, (pooled(side), pooled(side))) for frame in frames]
        parts = [(picks.reshape(4, -1), weights.reshape(4, -1)) for picks, weights in shrunk]
        return _joined([*parts, newline])
    base = _as_they_are(np.arange(side**2))
    if one.grid == SINGLE:
        return _joined([base, newline] if one.tokens > one.features else [base])
    rows, columns = one.grid
    # Crops row by row, in each of them features row by row: the map of all, [rows · side, columns · side].
    crops = np.arange(side**2, one.features).reshape(rows, columns, side, side).swapaxes(1, 2)
    plane = crops.reshape(rows * side, columns * side)
    plane = plane[unpad_crop(one.size[0], one.size[1], *plane.shape)]
    size = downsampled(len(plane), len(plane[0]), side, max_views)
    picks, weights = _as_they_are(plane) if size == plane.shape else shrink(plane, size)
    ends = [np.broadcast_to(x[:, None], (4, len(picks[0]), 1)) for x in newline]
    picks, weights = (np.concatenate(pair, axis=2).reshape(4, -1) for pair in ((picks, ends[0]), (weights, ends[1])))
    return _joined([base, (picks, weights)])


def _as_they_are(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each feature with weight one, and three more times with weight zero."""
    weights = np.zeros((4, *features.shape), dtype=np.float32)
    weights[0] = 1
    return np.broadcast_to(features, (4, *features.shape)), weights


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    picks, weights = zip(*parts, strict=True)
    return np.concatenate(picks, axis=1), np.concatenate(weights, axis=1)


def shrink(plane: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resampling of a map of features to `size`, as picks int64 and weights float32 `[4, *size]`.

    The four neighbours and weights of torch's `interpolate(mode="bilinear", align_corners=False)`, no antialiasing.
    """
    top, bottom, down = _neighbours(plane.shape[0], size[0])
    left, right, across = _neighbours(plane.shape[1], size[1])
    picks = [plane[np.ix_(rows, columns)] for rows in (top, bottom) for columns in (left, right)]
    one = np.float32(1)
    weights = [np.outer(y, x) for y in (one - down, down) for x in (one - across, across)]
    return np.stack(picks), np.stack(weights)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` points: the two of `old` it lies between, and how far from the first.

    In float32 as torch computes them, whose product and difference are one fused operation: in float64 throughout
    the weights would be other ones, by up to `old` roundoffs.
    """
    scale = np.float64(np.float32(old) / np.float32(new))
    source = np.maximum(scale * (np.arange(new) + 0.5) - 0.5, 0).astype(np.float32)
    first = source.astype(np.int64)
    return first, np.minimum(first + 1, old - 1), source - first.astype(np.float32)
