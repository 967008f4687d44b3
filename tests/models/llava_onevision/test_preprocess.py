"""Pictures and frames to patch rows.

The oracle is transformers' LlavaOnevisionImageProcessorPil with the published checkpoints' mean and standard deviation:
rows must be its pixels, bit by bit. Frames are compared with SigLIP's image processor, which the original applies to
each of them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tetrascope.errors import UserError
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig
from tetrascope.models.llava_onevision.preprocess import LlavaOneVisionMedia
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.tools.verify.families.llava_onevision import pixels_of, tiny_config

HALF = [0.5, 0.5, 0.5]
PUBLISHED: LlavaOneVisionConfig = FAMILY.presets["0.5b"]()


def media(config: LlavaOneVisionConfig = PUBLISHED, **options: Any) -> LlavaOneVisionMedia:
    return LlavaOneVisionMedia(config, DefaultMediaOptions(**options))


def theirs(config: LlavaOneVisionConfig = PUBLISHED) -> Any:
    side = config.vision.image
    return LlavaOnevisionImageProcessorPil(
        image_mean=HALF,
        image_std=HALF,
        size={"height": side, "width": side},
        image_grid_pinpoints=[list(canvas) for canvas in config.pinpoints],
    )


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def patches(pixels: np.ndarray, config: LlavaOneVisionConfig) -> np.ndarray:
    """`[n, 3, side, side]` -> rows, patch by patch, in the plainest way."""
    v = config.vision
    cut = range(0, v.side * v.patch, v.patch)
    return np.stack([view[:, y : y + v.patch, x : x + v.patch].ravel() for view in pixels for y in cut for x in cut])


@pytest.mark.parametrize("size", [(384, 384), (640, 480), (300, 1000), (37, 41), (700, 250)], ids=str)
def test_an_image_alone(size: tuple[int, int]) -> None:
    one = media().image(*size, 1)
    rows = media().rows([picture(*size)], one)
    expected = theirs()(picture(*size), return_tensors="np")["pixel_values"][0]
    assert rows.shape == (one.patches, 588) and rows.dtype == np.float32
    assert len(expected) == len(one.frames) == 1 + one.grid[0] * one.grid[1]
    assert np.array_equal(rows, patches(expected, PUBLISHED))


@pytest.mark.parametrize("multi_image", ["padded", "anyres"])
def test_several_images(multi_image: str) -> None:
    config = dataclasses.replace(tiny_config(multi_image=multi_image))
    shown = [picture(30, 14, 0), picture(9, 31, 1), picture(14, 14, 2)]
    # Nested, transformers takes them for one sample's images; flat, each for the only one of a sample.
    given: Any = [shown] if multi_image == "padded" else shown
    expected = theirs(config)(given, return_tensors="np", do_pad=False)["pixel_values"]
    for image, pixels in zip(shown, expected, strict=True):
        one = media(config).image(*image.size, 3)
        assert (len(one.frames) == 1 and one.tokens == one.features + 1) == (multi_image == "padded")
        assert np.array_equal(media(config).rows([image], one), patches(pixels, config))


def test_many_sizes_give_the_crops_that_transformers_gives() -> None:
    config, rng = tiny_config(), np.random.default_rng(0)
    for width, height in [(1, 1), (1, 30), (30, 2), *rng.integers(2, 90, (40, 2)).tolist()]:
        one = media(config).image(width, height, 1)
        expected = theirs(config)(picture(width, height), return_tensors="np")["pixel_values"][0]
        rows = media(config).rows([picture(width, height)], one)
        assert np.array_equal(rows, patches(expected, config)), (width, height)


def test_a_square_image_is_stretched() -> None:
    config = dataclasses.replace(tiny_config(), single_image="square")
    one = media(config).image(30, 20, 1)
    assert one.grid == (0, 0) and one.tokens == one.features == 9
    expected = SiglipImageProcessorPil(size={"height": 14, "width": 14}, image_mean=HALF, image_std=HALF)
    pixels = expected(picture(30, 20), return_tensors="np")["pixel_values"]
    assert np.array_equal(media(config).rows([picture(30, 20)], one), patches(pixels, config))


def test_frames_of_a_video() -> None:
    config = tiny_config()
    one = media(config).video(100, 25.0, 40, 30)
    assert one.numbers == (0, 25, 50, 75) and one.times == (0.0, 1.0, 2.0, 3.0)
    assert one.grid == (4, 2, 2) and one.tokens == 4 * 4 + 1 and one.frames == (9,) * 4 and one.size == (40, 30)
    frames = [picture(40, 30, seed) for seed in range(4)]
    expected = SiglipImageProcessorPil(size={"height": 14, "width": 14}, image_mean=HALF, image_std=HALF)
    pixels = expected(frames, return_tensors="np")["pixel_values"]
    assert np.array_equal(media(config).rows(frames, one), patches(pixels, config))


def test_how_many_frames() -> None:
    assert media().video(3000, 30.0, 64, 64).numbers == tuple(np.linspace(0, 2999, 32, dtype=int))
    assert len(media(max_frames=8).video(3000, 30.0, 64, 64).numbers) == 8
    assert media(fps=2.0).video(60, 30.0, 64, 64).numbers == (0, 15, 30, 45)
    with pytest.raises(UserError, match="has 0 frames"):
        media().video(0, 30.0, 64, 64)


def test_published_counts() -> None:
    assert media().image(640, 480, 1).tokens == 2929
    assert media().image(640, 480, 2).tokens == 730
    assert media().video(32, 1.0, 640, 480).tokens == 32 * 196 + 1


def test_fewer_tiles_where_the_user_says_so() -> None:
    # Stage 1.5 of the paper: 2x2, 1x{2,3}, {2,3}x1.
    assert media(max_tiles=4).image(2304, 2304, 1).grid == (2, 2)
    assert media(max_tiles=3).image(2304, 768, 1).grid == (1, 3)
    one = media(max_tiles=1).image(640, 480, 1)
    assert one.grid == (1, 1) and len(media(max_tiles=1).rows([picture(640, 480)], one)) == 2 * 729
    few = dataclasses.replace(PUBLISHED, pinpoints=((768, 768),))
    with pytest.raises(UserError, match=r"data\.max_tiles: 3 is less than every one"):
        media(few, max_tiles=3)


def test_pixels_beyond_the_last_patch_are_not_looked_at() -> None:
    config = tiny_config()
    image = picture(14, 14)
    other = image.copy()
    other.paste((1, 2, 3), (12, 0, 14, 14))
    one = media(config).image(14, 14, 2)
    assert np.array_equal(media(config).rows([image], one), media(config).rows([other], one))
    seen = pixels_of(config.vision, torch.from_numpy(media(config).rows([image], one)))[0, :, :12, :12]
    expected = np.asarray(image, dtype=np.float32)[:12, :12].transpose(2, 0, 1) / 255 * 2 - 1
    assert np.abs(seen.numpy() - expected).max() < 1e-6


def test_an_image_too_narrow_is_refused() -> None:
    with pytest.raises(UserError, match="too narrow"):
        media().image(1, 5000, 1)


def test_saved_processor_gives_the_same_rows(tmp_path: Path) -> None:
    # What a user limits in training is no property of the model, whose config.json knows all canvases.
    media(max_tiles=4).save(str(tmp_path))
    loaded = LlavaOnevisionImageProcessorPil.from_pretrained(tmp_path)
    assert [*loaded.image_mean] == [*loaded.image_std] == HALF
    assert loaded.image_grid_pinpoints == FAMILY.to_hf(PUBLISHED, "float32")["image_grid_pinpoints"]
    expected = loaded(picture(640, 480), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(media().rows([picture(640, 480)], media().image(640, 480, 1)), patches(expected, PUBLISHED))
    whole = json.loads((tmp_path / "processor_config.json").read_text())
    assert whole["num_image_tokens"] == 729 and whole["vision_feature_select_strategy"] == "full"
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert video["image_mean"] == HALF and video["size"] == {"height": 384, "width": 384} and video["resample"] == 3
