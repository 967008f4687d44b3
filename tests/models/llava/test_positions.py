"""Position ids, and which encoder rows become tokens, in LLaVA-1.5.

Golden numbers by hand, and an independent reckoning in floating point, one token after another, for V2PE. A mistake
here shows in no shape.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tetrascope.errors import UserError
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.llava import FAMILY
from tetrascope.models.llava.config import media
from tetrascope.tools.verify.families.llava import CONTENTS, IMAGE, make_document, tiny_config, v2pe_positions

ONE = media(tiny_config().vision, (100, 50))


def test_an_image_is_ten_rows_and_nine_tokens() -> None:
    assert (ONE.frames, ONE.features, ONE.tokens, ONE.patches) == ((10,), 10, 9, 10)


def test_golden_layout_of_two_images() -> None:
    layout = FAMILY.vision_layout(tiny_config(), [ONE, ONE])
    assert layout.positions_KN.tolist() == [[*range(10), *range(10)]]
    assert layout.picks_CV.tolist() == [[*range(1, 10), *range(11, 20)]]  # not 0 and 10, the class tokens
    assert layout.weights_CV is None
    nothing = FAMILY.vision_layout(tiny_config(), [])
    assert nothing.positions_KN.shape == nothing.picks_CV.shape == (1, 0)


@pytest.mark.parametrize("content", CONTENTS)
def test_positions_count_tokens(content: tuple[int | str, ...]) -> None:
    document = make_document(tiny_config(), content, 0)
    assert document.positions_AT.tolist() == [[256 * i for i in range(len(document.ids_T))]]


def test_golden_positions_of_v2pe() -> None:
    config = tiny_config(PositionRule("v2pe_fix", 64))
    ids = np.array([7, 7, *[IMAGE] * 9, 7])
    # Text at 0 and 1; nine visual tokens a quarter apart, the last at 3.25; text from there rounded up, at 5.
    expected = [0, 256, *range(320, 320 + 9 * 64, 64), 5 * 256]
    assert FAMILY.positions(config, ids, [ONE], (0, 0, 0)).tolist() == [expected]


@pytest.mark.parametrize("stride", [1, 64, 200, 256])
@pytest.mark.parametrize("content", CONTENTS)
def test_v2pe_is_the_reference_reckoning(content: tuple[int | str, ...], stride: int) -> None:
    document = make_document(tiny_config(PositionRule("v2pe_fix", stride)), content, 0)
    expected = v2pe_positions(document.ids_T, ONE.tokens, stride / 256)
    assert (document.positions_AT[0] / 256).tolist() == expected.tolist()


def test_visual_tokens_without_an_image_are_refused() -> None:
    config = dataclasses.replace(tiny_config(), positions=PositionRule())
    for count, shown in ((9, []), (8, [ONE]), (10, [ONE]), (9, [ONE, ONE])):
        with pytest.raises(UserError, match="visual tokens"):
            FAMILY.positions(config, np.array([7, *[IMAGE] * count, 7]), shown, (0, 0, 0))
