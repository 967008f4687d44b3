"""Video frames to patch rows.

Oracles: transformers' geometry and patchifier for video (compiled out of their source, torchvision being absent), and
its image path without torchvision, which shows a picture as a video of two equal frames: a video of two equal frames
must give the same rows to the last bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.models.layers.torchvision_free import oracle
from tetrascope.errors import UserError
from tetrascope.models.layers.video_patches import VideoPatches, frame_size, patchify_video, video_size


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sizes() -> list[tuple[int, int]]:
    drawn = np.random.default_rng(0).integers(1, 2500, (60, 2))
    fixed = [(1, 1), (28, 28), (32, 32), (42, 70), (199, 1), (640, 480), (1920, 1080), (30, 20), (5, 900)]
    return [
        *fixed,
        *((int(w), int(h)) for w, h in drawn if max(w, h) <= 200 * min(w, h)),
    ]


def test_frame_size_is_that_of_transformers() -> None:
    theirs = oracle("qwen2_vl.video_processing_qwen2_vl", "smart_resize")
    for width, height in sizes():
        for low, high in ((128 * 784, 768 * 784), (784, 784), (56 * 56, 20000)):
            expected = theirs(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert frame_size(width, height, min_pixels=low, max_pixels=high) == expected, (width, height)


def test_video_size_is_that_of_transformers() -> None:
    theirs = oracle("qwen3_vl.video_processing_qwen3_vl", "smart_resize")
    for width, height in sizes():
        for n in (2, 3, 5, 8, 100, 768):
            for low, high in ((128 * 1024, 768 * 1024), (4096, 25165824)):
                expected = theirs(n, height, width, factor=32, min_pixels=low, max_pixels=high)
                assert video_size(n, width, height, min_pixels=low, max_pixels=high) == expected, (n, width, height)


def test_total_budget_is_that_of_qwen_vl_utils() -> None:
    # 128 frames share 24576 tokens in 64 groups: 384 tokens, so 720p is shrunk; 4 frames may have 768 each.
    patches = VideoPatches(total_pixels=24576 * 784)
    assert patches.size(4, 1280, 720) == frame_size(1280, 720)
    assert patches.size(128, 1280, 720) == frame_size(1280, 720, max_pixels=384 * 784) != frame_size(1280, 720)
    assert VideoPatches().size(128, 1280, 720) == frame_size(1280, 720)


def test_order_of_rows_and_contents() -> None:
    # Two time steps, patches of 2x2 pixels, blocks of 2x2 patches, 2x3 blocks; a value is frame·1000 + y·20 + x.
    t, y, x = np.indices((4, 8, 12))
    frames = (t * 1000 + y * 20 + x)[:, None].astype(np.float32)
    rows = patchify_video(frames, patch=2)
    assert rows.shape == (2 * 4 * 6, 1 * 2 * 2 * 2) and rows.dtype == np.float32
    assert rows[0].tolist() == [0, 1, 20, 21, 1000, 1001, 1020, 1021]
    starts = [(int(value) // 1000, int(value) % 1000 // 40, int(value) % 20 // 2) for value in rows[:, 0]]
    first = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 4), (0, 5), (1, 4), (1, 5)]
    expected = [(t, r + 2 * block, c) for t in (0, 2) for block in (0, 1) for r, c in first]
    assert starts == expected


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_patchify_is_that_of_transformers(n: int) -> None:
    theirs = oracle("qwen2_vl.video_processing_qwen2_vl", "patchify")
    frames = np.random.default_rng(n).standard_normal((n, 3, 56, 84)).astype(np.float32)
    expected, t, h, w = theirs(None, torch.from_numpy(frames)[None], 14, 2, 2)
    rows = patchify_video(frames, 14)
    assert (t, h, w) == (-(-n // 2), 4, 6)
    assert np.array_equal(rows, expected[0].numpy())


def test_an_odd_video_repeats_its_last_frame() -> None:
    frames = np.random.default_rng(0).standard_normal((3, 3, 28, 28)).astype(np.float32)
    assert np.array_equal(patchify_video(frames, 14), patchify_video(frames[[0, 1, 2, 2]], 14))
    assert VideoPatches().grid(3, 1280, 720)[0] == 2


@pytest.mark.parametrize(("width", "height"), [(100, 80), (56, 84), (301, 200)])
def test_equal_frames_are_a_picture(width: int, height: int) -> None:
    bounds = {"min_pixels": 3136, "max_pixels": 40000}
    image = picture(width, height)
    expected = Qwen2VLImageProcessorPil(**bounds)(image, return_tensors="np")
    patches = VideoPatches(**bounds)
    for n in (1, 2, 5):
        rows = patches.patches([image] * n)
        grid = patches.grid(n, width, height)
        assert grid == (-(-n // 2), *expected["image_grid_thw"][0][1:])
        assert rows.dtype == np.float32
        assert np.array_equal(rows, np.tile(expected["pixel_values"], (grid[0], 1)))


def test_qwen3_frames() -> None:
    # Patch 16 and ImageNet "standard" statistics; with bounds on the whole video.
    half = (0.5, 0.5, 0.5)
    patches = VideoPatches(patch=16, mean=half, std=half, bounds="video", min_pixels=128 * 1024, max_pixels=768 * 1024)
    few, many = patches.grid(4, 640, 480), patches.grid(64, 640, 480)
    assert few[1] > many[1] and few[0] == 2 and many[0] == 32
    clip = [picture(640, 480, seed) for seed in range(4)]
    rows = patches.patches(clip)
    assert rows.shape == (np.prod(few), 3 * 2 * 16 * 16)
    height, width = patches.size(4, 640, 480)
    first = np.asarray(clip[0].resize((width, height), Image.Resampling.BICUBIC))[:16, :16] / 255
    assert np.abs(rows[0].reshape(3, 2, 16, 16)[:, 0] - (first.transpose(2, 0, 1) - 0.5) / 0.5).max() < 1e-6


def test_bad_videos_are_refused() -> None:
    with pytest.raises(UserError, match="201x1 pixels"):
        frame_size(201, 1)
    with pytest.raises(UserError, match="0x5 pixels"):
        video_size(2, 0, 5)
    with pytest.raises(UserError, match="has 1 frames, at least 2"):
        video_size(1, 64, 64)
    with pytest.raises(UserError, match="no frames"):
        VideoPatches().patches([])
    with pytest.raises(UserError, match="multiples of 28"):
        patchify_video(np.zeros((2, 3, 28, 42), np.float32), 14)
