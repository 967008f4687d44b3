"""Pictures and videos to patch rows, window by window.

The oracles: transformers' Pil image processor, whose rows ours are in another order, and its index of windows.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from tetrascope.errors import UserError
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.models.qwen2_5_vl import FAMILY
from tetrascope.models.qwen2_5_vl.preprocess import Qwen2_5VLMedia
from tetrascope.models.qwen2_vl.preprocess import Qwen2VLMedia

CONFIG = FAMILY.presets["3b"]()


def processor(**options: int | float) -> Qwen2_5VLMedia:
    return Qwen2_5VLMedia(CONFIG, DefaultMediaOptions(**options))  # type: ignore[arg-type]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_windows(rows: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Rows in transformers' order, permuted by transformers' index."""
    index, _ = get_vision_window_index(torch.tensor([list(grid[:3])]), 2, 112, 14)
    return rows.reshape(-1, 4, rows.shape[1])[index.numpy()].reshape(rows.shape)


@pytest.mark.parametrize("size", [(140, 112), (56, 56), (300, 200), (400, 100), (28, 500)])
def test_rows_are_transformers_rows_in_windows(size: tuple[int, int]) -> None:
    ours, theirs = processor(), Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=1003520)
    one = ours.image(*size, 1)
    out = theirs(picture(*size), return_tensors="np")
    assert one.grid[:3] == tuple(out["image_grid_thw"][0]) and one.grid[3:] == (0, 1) and one.size == size
    rows = ours.rows([picture(*size)], one)
    assert rows.dtype == np.float32 and rows.shape == (one.patches, 1176)
    assert np.array_equal(rows, in_windows(out["pixel_values"], one.grid))


def test_a_wide_picture_is_really_permuted() -> None:
    ours = processor()
    one = ours.image(140, 112, 1)  # 8 x 10 patches
    plain = Qwen2VLMedia(CONFIG, DefaultMediaOptions()).rows([picture(140, 112)], one)
    rows = ours.rows([picture(140, 112)], one)
    assert np.array_equal(rows[:16], plain[:16])
    assert np.array_equal(rows[16:20], plain[20:24])  # the sixth block: the fifth is in the next window
    assert np.array_equal(rows[64:68], plain[16:20])


def test_videos() -> None:
    # 2.5 seconds at 8 frames a second, two of which are taken a second: 20 frames, 4 taken (the least), 2 steps.
    ours = processor(video_max_pixels=140 * 112)
    one = ours.video(20, 8.0, 140, 112)
    assert one.kind == "video" and one.numbers == (0, 6, 13, 19) and one.size == (140, 112)
    assert one.grid == (2, 8, 10, 5, 4)  # 2.5 seconds in two steps
    assert one.windows == (64, 16) * 2 and one.frames == (80, 80) and one.tokens == 40
    frames = [picture(140, 112, seed) for seed in range(4)]
    plain = Qwen2VLMedia(CONFIG, DefaultMediaOptions(video_max_pixels=140 * 112)).rows(frames, one)
    assert np.array_equal(ours.rows(frames, one), in_windows(plain, one.grid))


@pytest.mark.parametrize(("fps", "rate"), [(30000 / 1001, Fraction(30000, 1001)), (25.0, Fraction(25))])
def test_seconds_of_a_step_are_exact(fps: float, rate: Fraction) -> None:
    one = processor().video(997, fps, 140, 112)
    n = len(one.numbers)
    assert Fraction(*one.grid[3:]) == 2 * 997 / (n * rate)
    # As transformers' VideoMetadata has it: temporal patch / (taken / frames · rate).
    assert one.grid[3] / one.grid[4] == pytest.approx(2 / (n / 997 * fps), rel=1e-12)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(UserError, match=r"image of 201x1 pixels: .*aspect ratio"):
        processor().image(201, 1, 1)
    with pytest.raises(UserError, match="a video has 1 frames, at least 2 are needed"):
        processor().video(1, 8.0, 140, 112)


def test_saved_processor_gives_the_same_pixels(tmp_path: Path) -> None:
    ours = processor(min_pixels=6272, max_pixels=12544)
    ours.save(str(tmp_path))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["patch_size"] == 14
    out = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(picture(300, 200), return_tensors="np")
    one = ours.image(300, 200, 1)
    assert np.array_equal(ours.rows([picture(300, 200)], one), in_windows(out["pixel_values"], one.grid))
