"""Pictures to patch rows.

The grid comes from the header alone, long before pixels are decoded; the oracle is the grid that transformers'
processor returns for real pixels. A difference would make a run stop at the first such picture. The rows' order and
scale are checked against pictures whose every patch has a value of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tetrascope.errors import UserError
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen2_vl.positions import patch_positions
from tetrascope.models.qwen2_vl.preprocess import Qwen2VLMedia
from tetrascope.tools.verify.families.qwen2_vl import tiny_config

MIN_PIXELS, MAX_PIXELS = 3136, 1003520
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def images(min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Qwen2VLMedia:
    return Qwen2VLMedia(tiny_config(), DefaultMediaOptions(min_pixels=min_pixels, max_pixels=max_pixels))


def grid_of(processor: Qwen2VLMedia, width: int, height: int) -> tuple[int, ...]:
    return processor.image(width, height, 1).grid


def rows_of(processor: Qwen2VLMedia, image: Image.Image) -> np.ndarray:
    return processor.rows([image], processor.image(*image.size, 1))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [
        (224, 224, (224, 224)),
        (480, 640, (476, 644)),
        (1080, 1920, (728, 1316)),
        (3000, 4000, (840, 1148)),
        (1, 199, (28, 812)),
        (70, 98, (56, 112)),  # 2.5 and 3.5 patches: Python rounds to even
    ],
)
def test_golden_sizes(height: int, width: int, pixels: tuple[int, int]) -> None:
    assert grid_of(images(), width, height) == (1, pixels[0] // 14, pixels[1] // 14)


@pytest.mark.parametrize(("low", "high"), [(3136, 50176), (28 * 28, 28 * 28), (10000, 20000)])
def test_grid_is_what_transformers_returns(low: int, high: int) -> None:
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 3), (3, 1), (3, 40), (1, 199), (200, 1), (14, 14), (42, 42), (70, 70), (500, 30)]
    sizes += [(int(width), int(height)) for width, height in rng.integers(2, 300, (25, 2))]
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            continue
        rows = rows_of(images(low, high), picture(width, height))
        expected = theirs(picture(width, height), return_tensors="np")
        grid = grid_of(images(low, high), width, height)
        assert grid == tuple(expected["image_grid_thw"][0]), (width, height)
        assert rows.shape == (grid[1] * grid[2], 1176)
        assert rows.dtype == np.float32 and np.array_equal(rows, expected["pixel_values"]), (width, height)


def test_default_bounds_are_not_used() -> None:
    # The class has bounds of its own (3136 and 1003520): ours must win.
    assert grid_of(images(100352, 200704), 56, 56) == (1, 24, 24)
    assert len(rows_of(images(100352, 200704), picture(56, 56))) == 24 * 24


def test_rows_are_patches_in_merge_order_scaled_as_clip() -> None:
    # Pixel (y, x) of channel c tells where it comes from; 56 x 84 pixels fit the grid, so that nothing is resized.
    y, x = np.indices((56, 84))
    pixels = np.stack([y * 4, x * 3, (y + x) % 256], axis=-1).astype(np.uint8)
    processor = images(28 * 28, MAX_PIXELS)
    assert grid_of(processor, 84, 56) == (1, 4, 6)
    rows = rows_of(processor, Image.fromarray(pixels)).reshape(24, 3, 2, 14, 14)
    places = patch_positions(2, [media("image", (1, 4, 6), 2)])
    for row, (h, w) in zip(rows, places.T.tolist(), strict=True):
        patch = pixels[h * 14 : h * 14 + 14, w * 14 : w * 14 + 14]
        expected = ((patch / 255.0 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)
        for frame in (0, 1):  # a picture is shown twice, as a video of two frames
            assert np.abs(row[:, frame] - expected).max() < 1e-5


@pytest.mark.parametrize(("width", "height"), [(201, 1), (1, 201), (4021, 20)])
def test_extreme_aspect_ratio_is_refused(width: int, height: int) -> None:
    with pytest.raises(UserError, match=rf"image of {width}x{height} pixels: .*aspect ratio"):
        grid_of(images(), width, height)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(UserError, match="image of 0x5 pixels"):
        grid_of(images(), 0, 5)


def test_saved_processor_gives_the_same_rows(tmp_path: Path) -> None:
    images(6272, 12544).save(str(tmp_path))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["patch_size"] == 14
    loaded = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    out = loaded(picture(300, 200), return_tensors="np")
    assert np.array_equal(out["pixel_values"], rows_of(images(6272, 12544), picture(300, 200)))
