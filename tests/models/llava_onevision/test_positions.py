"""Position ids of LLaVA-OneVision: golden numbers, in 1/256 of a token.

The oracle is counting by hand; parity with transformers' own positions is in test_model.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tetrascope.errors import UserError
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.tools.verify.families.llava_onevision import IMAGE, VIDEO, Clip, Picture, make_document, tiny_config

CONTENT = (2, Picture(14, 14), 3, Clip(2), 1)
"""An image of 9 + 3·4 tokens, a video of two frames of 4 and a newline."""


def test_visual_tokens_count_like_text() -> None:
    document = make_document(tiny_config(), CONTENT, seed=0)
    assert [one.tokens for one in document.media] == [21, 9]
    assert document.positions_AT.dtype == np.int64
    assert document.positions_AT.tolist() == [[256 * i for i in range(2 + 21 + 3 + 9 + 1)]]


def test_a_stride_of_a_quarter_token() -> None:
    config = dataclasses.replace(tiny_config(), positions=PositionRule("v2pe_fix", 64))
    document = make_document(config, CONTENT, seed=0)
    # Text ends at 1; the image goes on by quarters to 1 + 21/4 = 6.25, which text rounds up to 7.
    image = [256 + 64 * k for k in range(1, 22)]
    text = [256 * i for i in (8, 9, 10)]
    video = [2560 + 64 * k for k in range(1, 10)]  # ends at 12.25
    assert document.positions_AT.tolist() == [[0, 256, *image, *text, *video, 256 * 14]]


def test_a_drawn_stride_depends_on_sample_and_epoch() -> None:
    config = dataclasses.replace(tiny_config(), positions=PositionRule("v2pe_rnd"))
    document = make_document(tiny_config(), CONTENT, seed=0)

    def drawn(draw: tuple[int, int, int]) -> list[list[int]]:
        return FAMILY.positions(config, document.ids_T, document.media, draw).tolist()

    assert drawn((1, 2, 3)) == drawn((1, 2, 3))
    assert len({str(drawn((1, sample, epoch))) for sample in range(4) for epoch in range(4)}) > 8


def test_tokens_and_media_must_agree() -> None:
    document = make_document(tiny_config(), CONTENT, seed=0)
    with pytest.raises(UserError, match="expected 21 visual tokens at token 1"):
        FAMILY.positions(tiny_config(), document.ids_T[1:-20], document.media, (0, 0, 0))
    with pytest.raises(UserError, match="belong to none of its 1 images"):
        FAMILY.positions(tiny_config(), document.ids_T, document.media[:1], (0, 0, 0))
    assert FAMILY.visual_ids(tiny_config()) == (IMAGE, VIDEO)
