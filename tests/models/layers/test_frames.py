"""Which frames of a video.

Oracles: transformers' own sampling functions, and numbers worked out by hand from the rules.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from tests.models.layers.torchvision_free import oracle
from tetrascope.errors import UserError
from tetrascope.models.layers import frames

CLIPS = [(total, fps) for total in (4, 5, 7, 8, 30, 31, 49, 250, 1001, 4096) for fps in (0.7, 1.0, 12.5, 24.0, 29.97)]


def ascending(numbers: list[int], total: int) -> bool:
    return numbers == sorted(numbers) and numbers[0] >= 0 and numbers[-1] < total


def test_qwen_rule_by_hand() -> None:
    # 100 frames at 25/s are 4 s: 8 frames; linspace(0, 99, 8) = 0, 14.14, 28.29, 42.43, 56.57, 70.71, 84.86, 99
    assert frames.qwen_frames(100, 25.0) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert frames.qwen_frames(100, 25.0, rule="hf") == [0, 12, 25, 37, 50, 62, 75, 87]
    assert frames.qwen_frame_count(90, 25.0) == 6  # 7.2, down to even
    assert frames.qwen_frame_count(10, 25.0) == 4  # 0.8, up to min_frames
    assert frames.qwen_frame_count(3, 25.0) == 2  # min_frames cannot be had
    assert frames.qwen_frame_count(100_000, 25.0) == 768
    assert frames.qwen_frame_count(100_000, 25.0, max_frames=101) == 100
    assert frames.qwen_frame_count(9, 1.0) == 8  # 18, down to the 9 there are, down to even


@pytest.mark.parametrize(("total", "fps"), CLIPS)
def test_qwen_hf_rule_is_that_of_transformers(total: int, fps: float) -> None:
    sample = oracle("qwen2_vl.video_processing_qwen2_vl", "sample_frames")
    this = SimpleNamespace(num_frames=None, fps=2.0, temporal_patch_size=2, min_frames=4, max_frames=768)
    theirs = sample(this, SimpleNamespace(total_num_frames=total, fps=fps)).tolist()
    n = frames.qwen_frame_count(total, fps)
    ours = frames.qwen_frames(total, fps, rule="hf")
    assert len(ours) == n and ascending(ours, total)
    assert ours == theirs[:n]
    assert theirs[n:] in ([], [total])  # the number too many that rounding can give


def test_the_frame_that_does_not_exist_is_not_asked_for() -> None:
    sample = oracle("qwen2_vl.video_processing_qwen2_vl", "sample_frames")
    this = SimpleNamespace(num_frames=None, fps=2.0, temporal_patch_size=2, min_frames=4, max_frames=768)
    assert sample(this, SimpleNamespace(total_num_frames=17, fps=2.4)).tolist()[-1] == 17
    assert frames.qwen_frames(17, 2.4, rule="hf") == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15]


@pytest.mark.parametrize(("total", "fps"), CLIPS)
def test_qwen3_rule_is_that_of_transformers(total: int, fps: float) -> None:
    sample = oracle("qwen3_vl.video_processing_qwen3_vl", "sample_frames")
    theirs = sample(
        SimpleNamespace(num_frames=None, fps=2, min_frames=4, max_frames=768),
        SimpleNamespace(total_num_frames=total, fps=fps),
    )
    assert frames.qwen3_frames(total, fps) == theirs.tolist()


def test_qwen_pixel_budget() -> None:
    token = 28 * 28
    assert frames.qwen_frame_pixels(4) == 768 * token  # the frame's own limit
    assert frames.qwen_frame_pixels(64) == 768 * token  # 24576 / 64 · 2 = 768: just not yet the share
    assert frames.qwen_frame_pixels(128) == 384 * token
    assert frames.qwen_frame_pixels(768) == int(1.05 * 128 * token)  # the share would be 64, below the lower bound
    assert frames.qwen_frame_pixels(128, total_pixels=16384 * token) == 256 * token


def test_onevision() -> None:
    assert frames.onevision_frames(90, 29.97) == [0, 30, 60]
    assert frames.onevision_frames(91, 29.97) == [0, 30, 60, 90]
    assert frames.onevision_frames(32 * 25, 25.0) == list(range(0, 800, 25))
    capped = frames.onevision_frames(33 * 25, 25.0)
    assert len(capped) == 32 and capped[:3] == [0, 26, 53] and capped[-1] == 824  # 824/31 = 26.58…
    assert frames.onevision_frames(3, 0.25) == [0, 1, 2]


def test_internvl() -> None:
    # s = 99/4 = 24.75: 12.375 + 0, 25, 50 (49.5 to even), 74
    assert frames.internvl_frames(100, 4) == [12, 37, 62, 86]
    assert frames.internvl_frames(4, 4) == [0, 1, 2, 2]
    # Borders 0, 25, 50, 75, 100: the middle of 0..24 is 12
    assert frames.internvl_frames(100, 4, rule="intervals") == [12, 37, 62, 87]
    # Borders 0, 24, 48, 72, 96: the middle of 0..23, down
    assert frames.internvl_frames(96, 4, rule="intervals") == [11, 35, 59, 83]
    assert frames.internvl_frames(5, 5, rule="intervals") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("total", [8, 9, 31, 250, 1001])
def test_internvl_hf_rule_is_that_of_transformers(total: int) -> None:
    sample = oracle("internvl.video_processing_internvl", "sample_frames")
    this = SimpleNamespace(num_frames=8, initial_shift=True)
    theirs = sample(this, SimpleNamespace(total_num_frames=total, fps=25.0)).tolist()
    assert frames.internvl_frames(total, 8, rule="hf") == theirs


def test_vila() -> None:
    assert frames.vila_frames(10, 4) == [0, 3, 6, 9]
    assert frames.vila_frames(11, 4) == [0, 3, 7, 10]  # 3.33, 6.67
    assert frames.vila_frames(11, 4, rule="opencv") == [0, 3, 6, 9]
    assert frames.uniform_frames(11, 4) == [0, 3, 6, 10]


def test_all_rules_ascend_within_the_video() -> None:
    rng = random.Random(0)
    for _ in range(300):
        total, fps = rng.randrange(20, 30_000), rng.uniform(1, 60)
        n = rng.randrange(1, 20)
        for numbers in (
            frames.qwen_frames(total, fps),
            frames.qwen_frames(total, fps, rule="hf"),
            frames.qwen3_frames(total, fps),
            frames.onevision_frames(total, fps),
            frames.internvl_frames(total, n),
            frames.internvl_frames(total, n, rule="intervals"),
            frames.internvl_frames(total, n, rule="hf"),
            frames.vila_frames(total, n),
            frames.vila_frames(total, n, rule="opencv"),
            frames.uniform_frames(total, n),
        ):
            assert ascending(numbers, total) and (len(set(numbers)) == len(numbers) or total < 2 * n)


def test_too_few_frames_are_refused() -> None:
    too_short = [
        lambda: frames.qwen_frames(1, 25.0),
        lambda: frames.qwen3_frames(0, 25.0),
        lambda: frames.onevision_frames(0, 25.0),
        lambda: frames.internvl_frames(3, 4),
        lambda: frames.vila_frames(3, 4),
        lambda: frames.vila_frames(4, 4, rule="opencv"),
        lambda: frames.uniform_frames(3, 4),
    ]
    for call in too_short:
        with pytest.raises(UserError, match=r"a video has \d frames, at least \d are needed"):
            call()
    with pytest.raises(UserError, match="0 frames were asked for"):
        frames.vila_frames(3, 0)
    with pytest.raises(UserError, match="frame rate is 0"):
        frames.qwen_frames(10, 0)
