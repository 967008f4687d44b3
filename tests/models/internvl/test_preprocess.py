"""Pictures and videos to patch rows.

The oracle is transformers' processor of InternVL (GotOcr2, the one without torchvision): the same tiles, pixel for
pixel. Grids are also golden, from OpenGVLab's rule by hand.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tetrascope.errors import UserError
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.config import InternViTShape, InternVLConfig
from tetrascope.models.internvl.preprocess import MEAN, STD, InternVLMedia
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.tools.verify.families.internvl import tiny_config


def media(config: InternVLConfig | None = None, **options: int) -> InternVLMedia:
    return InternVLMedia(config or tiny_config(), DefaultMediaOptions(**options))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(rows: np.ndarray, shape: InternViTShape) -> np.ndarray:
    """Patch rows put together to tiles `[n, 3, s, s]`; what is in the class token's rows must be zero."""
    tiles = rows.reshape(-1, shape.rows, shape.patch_width)
    assert not tiles[:, 0].any()
    half = shape.side // 2
    #                                       tile, block row and column, place in the block, C, pixel
    blocks = tiles[:, 1:].reshape(-1, half, half, 2, 2, shape.channels, shape.patch, shape.patch)
    return blocks.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, shape.channels, shape.image, shape.image)


def theirs(config: InternVLConfig, most: int) -> GotOcr2ImageProcessorPil:
    side = config.vision.image
    return GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
        crop_to_patches=True,
        min_patches=1,
        max_patches=most,
    )


@pytest.mark.parametrize("most", [1, 2, 6, 12])
def test_tiles_are_those_of_transformers(most: int) -> None:
    config = tiny_config()
    processor = media(config, max_tiles=most)
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (56, 56), (112, 112), (113, 111), (600, 50), (50, 600)]
    for width, height in [*sizes, *rng.integers(5, 400, (12, 2)).tolist()]:
        image = picture(width, height)
        one = processor.image(width, height, 1)
        rows = processor.rows([image], one)
        expected = theirs(config, most)(image, return_tensors="np")["pixel_values"]
        assert len(one.frames) == len(expected), (width, height)
        assert one.size == (width, height) and one.frames == (17,) * len(expected)
        assert one.tokens == one.features == 4 * len(expected)
        assert rows.dtype == np.float32 and rows.shape == (one.patches, 588)
        assert np.array_equal(pixels(rows, config.vision), expected), (width, height)


@pytest.mark.parametrize(
    ("width", "height", "grid", "tiles"),
    [
        (448, 448, (1, 1), 1),  # 2 x 2 is as near, but the picture is no more than half of its pixels
        (700, 700, (2, 2), 5),
        (800, 600, (4, 3), 13),
        (896, 448, (2, 1), 3),
        (1000, 3000, (2, 6), 13),
        (1920, 1080, (4, 2), 9),
        (4000, 100, (12, 1), 13),
    ],
)
def test_golden_grids_of_the_published_size(width: int, height: int, grid: tuple[int, int], tiles: int) -> None:
    one = media(FAMILY.presets["internvl2-2b"]()).image(width, height, 1)
    assert one.grid[:2] == grid
    assert one.frames == (1025,) * tiles and one.tokens == 256 * tiles


def test_several_pictures_share_the_tiles_allowed() -> None:
    processor = media(max_tiles=12)
    assert [len(processor.image(400, 300, n).frames) for n in (1, 2, 3, 12, 50)] == [13, 7, 5, 1, 1]
    one = processor.image(400, 300, 2)
    image = picture(400, 300)
    expected = theirs(tiny_config(), 6)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels(processor.rows([image], one), tiny_config().vision), expected)


def test_a_model_may_do_without_thumbnails_and_ask_for_more_tiles() -> None:
    config = dataclasses.replace(tiny_config(), thumbnail=False, min_tiles=4)
    processor = media(config)
    for n in (1, 6):  # the fewest tiles are kept whatever the number of pictures
        one = processor.image(100, 100, n)
        assert one.grid[:2] == (2, 2) and len(one.frames) == 4
        assert processor.rows([picture(100, 100)], one).shape == (4 * 17, 588)
    with pytest.raises(UserError, match=r"data\.max_tiles: 3 is less than the model's 4"):
        media(config, max_tiles=3)


@pytest.mark.parametrize(
    ("options", "frames", "numbers"),
    [
        ({}, 40, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38]),
        ({"max_frames": 4}, 40, [4, 14, 24, 34]),
        ({}, 5, [0, 1, 2, 3, 4]),
        ({"min_frames": 2, "max_frames": 2}, 3, [0, 1]),
        ({"min_frames": 30}, 31, list(range(30))),
        ({"max_frames": 2}, 2, [0, 1]),
    ],
)
def test_frames_of_a_video(options: dict[str, int], frames: int, numbers: list[int]) -> None:
    one = media(**options).video(frames, 10.0, 64, 48)
    assert list(one.numbers) == numbers
    assert one.kind == "video" and one.frames == (17,) * len(numbers) and one.tokens == 4 * len(numbers)
    assert one.times == tuple(n / 10.0 for n in numbers) and one.size == (64, 48)


def test_a_frame_is_a_tile() -> None:
    config = tiny_config()
    processor = media(config, max_frames=3, min_frames=1)
    one = processor.video(3, 10.0, 300, 100)
    frames = [picture(300, 100, seed) for seed in range(3)]
    expected = theirs(config, 1)(frames, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels(processor.rows(frames, one), config.vision), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "a video has 3 frames, at least 4 are needed"), ({"min_frames": 9}, "3 frames, at least 9")],
)
def test_a_video_that_is_too_short_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        media(**options).video(3, 10.0, 64, 48)


def test_frame_bounds_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match=r"data\.min_frames: 9 is more than max_frames 8"):
        media(min_frames=9, max_frames=8)


def test_saved_processor_gives_the_same_tiles(tmp_path: Path) -> None:
    processor = media(max_tiles=5)
    processor.save(str(tmp_path))
    loaded = GotOcr2ImageProcessorPil.from_pretrained(tmp_path)
    image = picture(300, 200)
    rows = processor.rows([image], processor.image(300, 200, 1))
    assert np.array_equal(pixels(rows, tiny_config().vision), loaded(image, return_tensors="np")["pixel_values"])
