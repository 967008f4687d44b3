"""Pictures and videos to patch rows.

Sizes come from the header alone, long before pixels are decoded; the oracles are transformers' image processor (bit
for bit) and the functions of its video processor and processor that need no torchvision.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tests.models.layers.torchvision_free import oracle
from tetrascope.errors import UserError
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.models.qwen3_vl.preprocess import Qwen3VLMedia, step_times
from tetrascope.tools.verify.families.qwen3_vl import tiny_config

HALF = [0.5, 0.5, 0.5]


def processor(**options: Any) -> Qwen3VLMedia:
    return Qwen3VLMedia(tiny_config(), DefaultMediaOptions(**options))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(low: int, high: int) -> Any:
    size = {"shortest_edge": low, "longest_edge": high}
    return Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=HALF, image_std=HALF)


@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [
        (256, 256, (256, 256)),
        (480, 640, (480, 640)),
        (1080, 1920, (1088, 1920)),
        (6000, 8000, (3520, 4704)),
        (80, 112, (224, 320)),  # less than 64 tokens
    ],
)
def test_golden_sizes_of_images(height: int, width: int, pixels: tuple[int, int]) -> None:
    assert processor().image(width, height, 1).grid == (1, pixels[0] // 16, pixels[1] // 16)


@pytest.mark.parametrize(("low", "high"), [(65536, 65536 * 4), (1024, 50176), (10000, 20000)])
def test_images_are_transformers_pixel_for_pixel(low: int, high: int) -> None:
    ours, hf = processor(min_pixels=low, max_pixels=high), theirs(low, high)
    sizes = [(1, 1), (3, 40), (1, 199), (16, 16), (48, 80), (500, 30), (301, 222)]
    for width, height in sizes:
        shown = ours.image(width, height, 1)
        expected = hf(picture(width, height), return_tensors="np")
        rows = ours.rows([picture(width, height)], shown)
        assert shown.grid == tuple(expected["image_grid_thw"][0]), (width, height)
        assert rows.shape == (shown.patches, 1536) and rows.dtype == np.float32
        assert np.array_equal(rows, expected["pixel_values"]), (width, height)


def hf_video_size(frames: int, height: int, width: int, frame_pixels: int) -> tuple[int, int]:
    """transformers' `resize` up to the call of torchvision, with the cap on a frame and the published bounds."""
    resize = oracle("qwen3_vl.video_processing_qwen3_vl", "resize")
    found: list[tuple[int, int]] = []

    class Parent:
        def resize(self, image: Any, size: Any, resample: Any) -> None:
            found.append((size.height, size.width))

    resize.__globals__.update(
        smart_resize=oracle("qwen3_vl.video_processing_qwen3_vl", "smart_resize"),
        SizeDict=lambda height, width: types.SimpleNamespace(height=height, width=width),
        super=Parent,
    )
    resize(
        types.SimpleNamespace(max_video_tokens=frame_pixels // 1024),
        np.empty((1, frames, 3, height, width), dtype=np.bool_),
        types.SimpleNamespace(shortest_edge=4096, longest_edge=25165824),
        None,
        32,
        2,
        True,
    )
    return found[0]


@pytest.mark.parametrize("frame_pixels", [768 * 1024, 64 * 1024])
def test_sizes_of_videos_are_transformers(frame_pixels: int) -> None:
    ours = processor(fps=5.0, min_frames=2, video_max_pixels=frame_pixels)
    rng = np.random.default_rng(0)
    for frames in (2, 3, 5, 64, 301, 768):
        sizes = [(640, 360), (20, 15), (1920, 1080), *rng.integers(16, 1500, (4, 2)).tolist()]
        for width, height in sizes:
            if max(width, height) > 200 * min(width, height):
                continue
            shown = ours.video(frames, 5.0, width, height)
            h, w = hf_video_size(frames, height, width, frame_pixels)
            assert len(shown.numbers) == frames
            assert shown.grid == (-(-frames // 2), h // 16, w // 16), (frames, width, height)


def test_many_frames_make_each_of_them_smaller() -> None:
    # A budget of 24576 tokens: 768 a frame for eight of them (the cap), 35 for 700.
    ours = processor(fps=25.0)
    short, long = (ours.video(n, 25.0, 1280, 720) for n in (8, 700))
    for shown, most in ((short, 768), (long, 35)):
        assert 0.7 * most < shown.tokens / shown.grid[0] <= most


def test_a_video_from_its_header() -> None:
    shown = processor(max_frames=5).video(90, 30.0, 320, 256)
    assert shown.numbers == (0, 22, 44, 67, 89) and shown.kind == "video"
    assert shown.frames == (shown.grid[1] * shown.grid[2],) * 3
    seconds = [n / 30 for n in (0, 22, 44, 67, 89, 89)]
    assert shown.times == tuple((a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True))
    clip = [picture(320, 256, seed) for seed in range(5)]
    rows = processor(max_frames=5).rows(clip, shown)
    assert rows.shape == (shown.patches, 1536) and rows.dtype == np.float32


def test_rows_of_equal_frames_are_those_of_the_picture() -> None:
    one = picture(320, 256)
    shown = processor().video(60, 30.0, 320, 256)
    rows = processor().rows([one] * len(shown.numbers), shown)
    expected = theirs(1024, 10**7)(one, return_tensors="np")
    assert shown.grid[1:] == tuple(expected["image_grid_thw"][0][1:])
    assert np.array_equal(rows, np.tile(expected["pixel_values"], (shown.grid[0], 1)))


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("fps", [24.0, 30000 / 1001, 2.0, 59.94])
def test_times_are_transformers(count: int, fps: float) -> None:
    numbers = np.linspace(0, 300, count).round().astype(int).tolist()
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(numbers), fps, 2)
    assert list(step_times(numbers, fps, 2)) == expected


@pytest.mark.parametrize(("width", "height"), [(201, 1), (1, 201), (0, 5)])
def test_sizes_that_cannot_be_used_are_named(width: int, height: int) -> None:
    with pytest.raises(UserError, match=rf"image of {width}x{height} pixels"):
        processor().image(width, height, 1)
    if width == 0:
        with pytest.raises(UserError, match="0x5 pixels"):
            processor().video(30, 30.0, 0, 5)


def test_a_video_of_one_frame_is_refused() -> None:
    with pytest.raises(UserError, match="has 1 frames, at least 2"):
        processor().video(1, 30.0, 64, 64)


def test_bounds_that_exclude_each_other_are_named() -> None:
    with pytest.raises(UserError, match=r"data\.min_pixels: 5000 is more than data\.max_pixels=4000"):
        processor(min_pixels=5000, max_pixels=4000)


def test_a_maximum_below_the_default_minimum_takes_it_along() -> None:
    grid = processor(max_pixels=50176).image(640, 480, 1).grid
    assert grid == (1, 12, 16) and grid[1] * grid[2] * 256 <= 50176


def test_saved_processors(tmp_path: Path) -> None:
    ours = processor(min_pixels=6272, max_pixels=65536, video_max_pixels=65536, max_frames=16)
    ours.save(str(tmp_path))
    loaded = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    out = loaded(picture(300, 200), return_tensors="np")
    assert np.array_equal(out["pixel_values"], ours.rows([picture(300, 200)], ours.image(300, 200, 1)))
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert video["size"] == {"shortest_edge": 4096, "longest_edge": 25165824}
    assert (video["max_video_tokens"], video["max_frames"], video["patch_size"]) == (64, 16, 16)
