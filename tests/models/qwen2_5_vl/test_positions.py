"""M-RoPE with absolute time, and the order of windows.

Golden numbers worked out by hand from the rules, and transformers' own `get_rope_index` and `get_vision_window_index`.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tetrascope.errors import UserError
from tetrascope.models.qwen2_5_vl import FAMILY
from tetrascope.models.qwen2_5_vl.config import Qwen2_5VLConfig, media
from tetrascope.models.qwen2_5_vl.positions import seconds_per_step, time_steps, vision_layout
from tetrascope.models.qwen2_5_vl.windows import video_order, window_lengths, window_order
from tetrascope.models.qwen2_vl.positions import patch_positions
from tetrascope.tools.verify.families.qwen2_5_vl import (
    CONTENTS,
    IMAGE,
    VIDEO,
    Grid,
    make_document,
    oracle,
    tiny_config,
)

HF = tiny_config()
PAPER = dataclasses.replace(HF, position_rule="paper")
WIDE = dataclasses.replace(HF, vision=dataclasses.replace(HF.vision, window=112))
"""The published windows: 4 x 4 merged patches."""

# Five text tokens, an image of 4x6 patches, four text tokens, a video of three frames of 4x4 patches a second apart
# (two temporal positions), seven text tokens; a start and an end token around the visual ones.
GOLDEN: tuple[int | Grid, ...] = (5, (1, 4, 6), 4, (3, 4, 4, 1, 1), 7)


@pytest.mark.parametrize(("config", "after_video"), [(PAPER, 20), (HF, 17)])
def test_golden_positions(config: Qwen2_5VLConfig, after_video: int) -> None:
    document = make_document(HF, GOLDEN, seed=0)
    positions = FAMILY.positions(config, document.ids_T, document.media, (0, 0, 0))
    text = list(range(6))
    between = list(range(9, 15))  # end of the image, four text tokens, start of the video
    rest = list(range(after_video, after_video + 8))
    assert positions.dtype == np.int64
    assert positions.tolist() == [
        text + [6] * 6 + between + [15] * 4 + [17] * 4 + [19] * 4 + rest,
        text + [6, 6, 6, 7, 7, 7] + between + [15, 15, 16, 16] * 3 + rest,
        text + [6, 7, 8, 6, 7, 8] + between + [15, 16, 15, 16] * 3 + rest,
    ]


@pytest.mark.parametrize(
    "content", [*CONTENTS, GOLDEN, ((1, 4, 4), (5, 2, 6, 3, 4), 1, (8, 2, 2, 1, 8), (1, 2, 2), 3)], ids=str
)
def test_hf_rule_is_transformers_rule(content: tuple[int | Grid, ...]) -> None:
    document = make_document(HF, content, seed=0)
    with torch.device("meta"):
        model = oracle(HF)
    ids = torch.from_numpy(document.ids_T)[None]
    videos = [m.grid for m in document.media if m.kind == "video"]
    expected, _ = model.model.get_rope_index(
        ids,
        (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        image_grid_thw=torch.tensor([m.grid[:3] for m in document.media if m.kind == "image"]),
        video_grid_thw=torch.tensor([grid[:3] for grid in videos]),
        second_per_grid_ts=torch.tensor([grid[3] / grid[4] for grid in videos]),
    )
    assert torch.equal(torch.from_numpy(document.positions_AT), expected[:, 0])


def steps(frames: int, seconds: Fraction) -> list[int]:
    return time_steps(HF, media("video", (frames, 2, 2), HF.vision, seconds))


@pytest.mark.parametrize(
    ("frames", "seconds", "expected"),
    [
        (4, Fraction(1), [0, 2, 4, 6]),
        (6, Fraction(1, 4), [0, 0, 1, 1, 2, 2]),  # several frames at one position
        (4, Fraction(3, 4), [0, 1, 3, 4]),
        (3, Fraction(10), [0, 20, 40]),
    ],
)
def test_golden_time(frames: int, seconds: Fraction, expected: list[int]) -> None:
    assert steps(frames, seconds) == expected


def test_time_is_exact_where_floats_are_not() -> None:
    # By definition: frame i · q of p/q seconds is p seconds. In fp32, as transformers computes, some come out one less.
    lost = 0
    for denominator in (3, 7, 11, 13, 23, 49):
        for numerator in (1, 2, 5):
            found = steps(10 * denominator + 1, Fraction(numerator, denominator))
            assert [found[i * denominator] for i in range(11)] == [2 * numerator * i for i in range(11)]
            single = (torch.arange(len(found)) * (2 * (numerator / denominator))).long()
            lost += int((torch.tensor(found) != single).sum())
    assert lost > 0


@pytest.mark.parametrize(
    ("frames", "fps", "chosen", "expected"),
    [
        (300, 30.0, 20, Fraction(1)),  # two frames a second, two to a step
        (300, 30000 / 1001, 20, Fraction(1001, 1000)),
        (48, 24000 / 1001, 4, Fraction(1001, 1000)),
        (1000, 23.976, 84, Fraction(2000, 84) / Fraction(23976, 1000)),
        (5, 1 / 3, 4, Fraction(15, 2)),
    ],
)
def test_seconds_of_a_step(frames: int, fps: float, chosen: int, expected: Fraction) -> None:
    assert seconds_per_step(frames, fps, chosen, 2) == expected


def test_still_pictures_take_no_time() -> None:
    assert time_steps(HF, media("image", (1, 4, 4), HF.vision)) == [0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([7, *[IMAGE] * 5, 9], "expected 6 visual tokens at token 1 for a 1x2x3 grid"),
        ([7, *[IMAGE] * 7, 9], "1 visual tokens belong to none of its 1 images"),
    ],
)
def test_wrong_number_of_visual_tokens_is_named(ids: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.positions(HF, np.array(ids), [media("image", (1, 4, 6), HF.vision)], (0, 0, 0))


# --- windows


def test_golden_windows() -> None:
    # 8 x 10 patches are 4 x 5 merged: a window of 4 x 4, and the column that is left.
    order = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 4, 9, 14, 19]
    assert window_order(4, 5, 4).tolist() == order
    one = media("image", (1, 8, 10), WIDE.vision)
    assert one.windows == (64, 16) and one.frames == (80,) and one.tokens == one.features == 20


@pytest.mark.parametrize(
    ("grid", "lengths"),
    [
        ((1, 2, 2), (4,)),
        ((1, 8, 8), (64,)),
        ((1, 16, 8), (64, 64)),
        ((2, 10, 18), (64, 64, 16, 16, 16, 4) * 2),  # ragged at the right, at the bottom, and in the corner
    ],
)
def test_golden_window_lengths(grid: tuple[int, int, int], lengths: tuple[int, ...]) -> None:
    one = media("video" if grid[0] > 1 else "image", grid, WIDE.vision)
    assert one.windows == lengths and sum(lengths) == one.patches


@pytest.mark.parametrize("side", [1, 2, 4])
def test_windows_are_transformers_windows(side: int) -> None:
    for t in (1, 3):
        for rows in range(1, 10):
            for columns in range(1, 10):
                order, borders = get_vision_window_index(torch.tensor([[t, rows * 2, columns * 2]]), 2, side * 28, 14)
                assert video_order(t, rows, columns, side).tolist() == order.tolist()
                lengths = window_lengths(rows, columns, side, 4) * t
                assert [0, *np.cumsum(lengths)] == borders.tolist()


def test_the_layout_of_a_micro_batch_undoes_the_order() -> None:
    shown = [media("image", (1, 8, 10), WIDE.vision), media("video", (2, 4, 12), WIDE.vision, Fraction(1))]
    shown.append(media("image", (1, 2, 2), WIDE.vision))
    layout = vision_layout(WIDE, shown)
    assert layout.weights_CV is None and layout.positions_KN.dtype == layout.picks_CV.dtype == torch.int64
    # What the encoder gets, four rows a feature; picking the features restores the picture's order.
    features = layout.positions_KN.unflatten(1, (-1, 4))
    assert torch.equal(features[:, layout.picks_CV[0]].flatten(1), patch_positions(2, shown))
    assert layout.positions_KN[:, :4].tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert layout.positions_KN[:, 16:20].tolist() == [[2, 2, 3, 3], [0, 1, 0, 1]]  # not the fifth block of the row
    none = vision_layout(WIDE, [])
    assert none.positions_KN.shape == (2, 0) and none.picks_CV.shape == (1, 0)
