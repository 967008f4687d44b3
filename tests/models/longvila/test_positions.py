"""Golden position ids, and which features become which tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tetrascope.errors import UserError
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import clip, picture
from tetrascope.tools.verify.families.longvila import IMAGE, NEWLINE, tiny_config

FRAME = [IMAGE] * 4 + [NEWLINE]
IDS = np.array([9, 9, *FRAME, *FRAME, 9], dtype=np.int64)
"""Two words, two frames of four tokens, a word."""


def positions(rule: PositionRule, draw: tuple[int, int, int] = (0, 0, 0)) -> list[float]:
    config = tiny_config(rule=rule)
    found = FAMILY.positions(config, IDS, [clip(config, (0, 5))], draw)
    assert found.shape == (1, len(IDS)) and found.dtype == np.int64
    return (found[0] / 256).tolist()


def test_by_default_visual_tokens_count_like_text() -> None:
    assert positions(PositionRule()) == list(range(13))


def test_v2pe_gives_every_frame_a_span_of_its_own() -> None:
    # Stride 64: a quarter of a token each; the newline after a frame starts at the next whole position.
    frames = [1.25, 1.5, 1.75, 2.0, 3.0, 3.25, 3.5, 3.75, 4.0, 5.0]
    assert positions(PositionRule("v2pe_fix", 64)) == [0, 1, *frames, 6]
    # Stride 72: 4 · 72 / 256 = 1.125 tokens, rounded up.
    frames = [1.28125, 1.5625, 1.84375, 2.125, 4.0, 4.28125, 4.5625, 4.84375, 5.125, 7.0]
    assert positions(PositionRule("v2pe_fix", 72)) == [0, 1, *frames, 8]


def test_v2pe_draws_a_stride_for_every_frame() -> None:
    drawn = [positions(PositionRule("v2pe_rnd"), (0, sample, 0)) for sample in range(8)]
    strides = [(x[3] - x[2], x[8] - x[7]) for x in drawn]
    assert any(a != b for a, b in strides), strides
    assert drawn[0] == positions(PositionRule("v2pe_rnd"), (0, 0, 0))


def test_visual_tokens_that_no_frame_accounts_for() -> None:
    config = tiny_config()
    with pytest.raises(UserError, match="4 visual tokens belong to none of its 1 images"):
        FAMILY.positions(config, IDS, [picture(config, (14, 14))], (0, 0, 0))
    with pytest.raises(UserError, match="expected 4 visual tokens at token 13"):
        FAMILY.positions(config, IDS, [clip(config, (0, 1, 2))], (0, 0, 0))


def test_features_become_tokens_by_rows_or_columns() -> None:
    for order, expected in (("rows", [0, 1, 2, 3]), ("columns", [0, 2, 1, 3])):
        config = tiny_config(order=order)
        media = [picture(config, (20, 30)), clip(config, (0, 4))]
        layout = FAMILY.vision_layout(config, media)
        picks = torch.tensor(expected)
        assert torch.equal(layout.picks_CV[0], torch.cat([picks, picks + 4, picks + 8]))
        assert torch.equal(layout.positions_KN[0], torch.arange(9).repeat(3)) and layout.weights_CV is None


def test_tokens_of_a_frame() -> None:
    config = FAMILY.presets["7b"]()
    assert config.vision.side == 27 and config.side == 14
    assert picture(config, (640, 480)).tokens == 196 and clip(config, tuple(range(256))).tokens == 256 * 196
    one = clip(config, tuple(range(3)))
    assert one.frames == (729,) * 3 and one.features == one.tokens
