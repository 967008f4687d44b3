"""From pictures and videos to InternVL's patch rows: dynamic tiling with a thumbnail, one tile for a video's frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.internvl.config import InternVLConfig, framed, tiled
from tetrascope.models.internvl.positions import patch_order
from tetrascope.models.layers.frames import check_rate, internvl_frames
from tetrascope.models.layers.tiles import check_size, dynamic_grid, dynamic_tiles, normalized, patchify
from tetrascope.models.media import Media, MediaOptions

MEDIA_OPTIONS = frozenset(("max_tiles", "min_frames", "max_frames"))

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""

MIN_FRAMES, MAX_FRAMES = 4, 20
"""Frames of a video (defaults of V2PE's training)."""


class InternVLMedia:
    """Pictures are stretched to the grid of tiles whose shape is nearest to theirs.

    Several pictures share the tiles allowed, max(1, max_tiles // pictures) each, as in OpenGVLab's
    `multi_modal_multi_image_get_item`. Videos give max_frames frames, one from the middle of each of as many equal
    intervals, or all that they have; OpenGVLab draws the number anew each time, between min_frames and max_frames.
    """

    def __init__(self, config: InternVLConfig, options: MediaOptions) -> None:
        self._config = config
        self._max_tiles = options.max_tiles or config.max_tiles
        if self._max_tiles < config.min_tiles:
            raise UserError(f"data.max_tiles: {self._max_tiles} is less than the model's {config.min_tiles}; raise it")
        self._max_frames = options.max_frames or max(MAX_FRAMES, options.min_frames or 0)
        self._min_frames = options.min_frames or min(MIN_FRAMES, self._max_frames)
        if self._min_frames > self._max_frames:
            raise UserError(f"data.min_frames: {self._min_frames} is more than max_frames {self._max_frames}; lower it")
        self._order = patch_order(config.vision.side)

    def image(self, width: int, height: int, images: int) -> Media:
        """Raises UserError for no pixels at all."""
        most = max(self._config.min_tiles, self._max_tiles // images)
        columns, rows = dynamic_grid(width, height, self._config.min_tiles, most, self._config.vision.image)
        tiles = columns * rows
        tiles += self._config.thumbnail and tiles > 1
        return tiled(self._config, (columns, rows, most), tiles, size=(width, height))

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """Raises UserError for fewer frames than min_frames, and for a rate or size that is not positive."""
        check_rate(fps)
        check_size(width, height)
        if frames < self._min_frames:
            raise UserError(
                f"a video has {frames} frames, at least {self._min_frames} are needed; leave it out of the data or "
                "lower data.min_frames"
            )
        numbers = internvl_frames(frames, min(frames, self._max_frames), rule="intervals")
        times = tuple(n / fps for n in numbers)
        return framed(self._config, len(numbers), numbers=tuple(numbers), times=times, size=(width, height))

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[of.patches, P]`: of each tile a row of zeros for the class token, then patches in patch_order."""
        size = self._config.vision.image
        if of.kind == "video":
            tiles = [tile for picture in pictures for tile in dynamic_tiles(picture, 1, 1, size)]
        else:
            low, most, thumbnail = self._config.min_tiles, of.grid[2], self._config.thumbnail
            tiles = dynamic_tiles(pictures[0], low, most, size, thumbnail=thumbnail)
        v = self._config.vision
        rows = np.zeros((len(tiles), v.rows, v.patch_width), dtype=np.float32)
        patches = patchify(normalized(tiles, MEAN, STD), v.patch).reshape(len(tiles), -1, v.patch_width)
        rows[:, 1:] = patches[:, self._order]
        return rows.reshape(-1, v.patch_width)

    def save(self, folder: str) -> None:
        """Writes the preprocessor_config.json of transformers' InternVL, with tiling on."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        side = self._config.vision.image
        GotOcr2ImageProcessorPil(
            size={"height": side, "width": side},
            image_mean=list(MEAN),
            image_std=list(STD),
            crop_to_patches=self._max_tiles > 1,
            min_patches=self._config.min_tiles,
            max_patches=self._max_tiles,
        ).save_pretrained(folder)
