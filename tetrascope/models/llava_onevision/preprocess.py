"""From pictures and videos to the patch rows of LLaVA-OneVision's views.

Pillow's BICUBIC throughout, also for the frames of videos, as in the original (SigLIP's image processor on every
frame) and in transformers' image processor without torchvision; transformers' video processor needs torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tetrascope.errors import UserError
from tetrascope.models.layers.frames import onevision_frames
from tetrascope.models.layers.tiles import BICUBIC, anyres_views, check_size, normalized, pad_to_square, patchify, rgb
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig
from tetrascope.models.llava_onevision.views import SINGLE, anyres_media, single_media, video_media
from tetrascope.models.media import Media, MediaOptions

MEDIA_OPTIONS = frozenset(("max_tiles", "fps", "max_frames"))

MEAN = STD = (0.5, 0.5, 0.5)
"""Of the published checkpoints; the defaults of transformers' class are CLIP's."""

FPS, MAX_FRAMES = 1.0, 32
"""Frames of a video: one a second, at most 32, then evenly (arXiv 2408.03326 §3.2; llava/utils.py)."""


class LlavaOneVisionMedia:
    """AnyRes for the only image of a sample, one padded view for each of several, all frames of a video alike.

    A sample with an image and a video counts as one of several: data of that kind is not in the original.
    """

    def __init__(self, config: LlavaOneVisionConfig, options: MediaOptions) -> None:
        self._config, self._vision, self._options = config, config.vision, options
        self._pinpoints = config.pinpoints
        if options.max_tiles is not None:
            most = options.max_tiles * config.vision.image**2
            self._pinpoints = tuple((h, w) for h, w in config.pinpoints if h * w <= most)
            if not self._pinpoints:
                raise UserError(f"data.max_tiles: {options.max_tiles} is less than every one of the model's grids has")

    def image(self, width: int, height: int, images: int) -> Media:
        """Raises UserError for a size that no grid of crops can hold."""
        if (self._config.multi_image if images > 1 else self._config.single_image) == "anyres":
            return anyres_media(self._vision, self._pinpoints, self._config.max_views, width, height)
        return single_media(self._vision, newline=images > 1, width=width, height=height)

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """Raises UserError for a video without frames or pixels, and for a rate that is not positive."""
        check_size(width, height)
        chosen = self._options
        numbers = onevision_frames(frames, fps, fps=chosen.fps or FPS, max_frames=chosen.max_frames or MAX_FRAMES)
        times = tuple(n / fps for n in numbers)
        return video_media(self._vision, tuple(numbers), times, (width, height))

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[views · side², P]`. Pixels beyond the last whole patch are not looked at (384 = 27 · 14 + 6)."""
        v = self._vision
        if of.kind == "video":
            views = [_square(picture, v.image) for picture in pictures]
        elif of.grid != SINGLE:
            views = anyres_views(pictures[0], self._pinpoints, v.image)
        elif of.tokens > of.features:
            views = [_square(pad_to_square(pictures[0], MEAN), v.image)]
        else:
            views = [_square(pictures[0], v.image)]
        seen = v.side * v.patch
        return patchify(normalized(views, MEAN, STD)[:, :, :seen, :seen], v.patch)

    def save(self, folder: str) -> None:
        """Writes preprocessor_config.json, and what transformers' processor wants besides: the number of features."""
        from transformers.models.llava_onevision import image_processing_pil_llava_onevision as hf

        side = self._vision.image
        processor = hf.LlavaOnevisionImageProcessorPil(
            image_mean=list(MEAN),
            image_std=list(STD),
            size={"height": side, "width": side},
            image_grid_pinpoints=[list(canvas) for canvas in self._config.pinpoints],
        )
        processor.save_pretrained(folder)
        video = {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "resample": int(BICUBIC),
            "rescale_factor": 1 / 255,
            "size": {"height": side, "width": side},
        }
        whole = {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": self._vision.side**2,
            "vision_aspect_ratio": f"anyres_max_{self._config.max_views}",
            "vision_feature_select_strategy": "full",
        }
        for name, contents in (("video_preprocessor_config.json", video), ("processor_config.json", whole)):
            Path(folder, name).write_text(json.dumps(contents, indent=2) + "\n")


def _square(picture: Image.Image, side: int) -> Image.Image:
    """Stretched to side x side pixels."""
    return rgb(picture).resize((side, side), BICUBIC)
