"""M-RoPE positions and patch positions of Qwen2-VL.

Golden numbers worked out by hand from the rule in arXiv 2409.12191 §2.1 (positions of text count on from the largest
one used so far), and transformers' own `get_rope_index`, which has another rule for what follows a video. A mistake
here is invisible in shapes and nearly invisible in the loss of an untrained model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen2_vl.positions import mrope_positions, patch_positions
from tetrascope.tools.verify.families.qwen2_vl import (
    CONTENTS,
    IMAGE,
    VIDEO,
    make_document,
    oracle,
    tiny_config,
)

Content = tuple[int | tuple[int, int, int], ...]

PAPER = dataclasses.replace(tiny_config(), position_rule="paper")
HF = dataclasses.replace(tiny_config(), position_rule="hf")

# Five text tokens, an image of 4x6 patches, four text tokens, a video of three frames of 4x4 patches, seven text
# tokens; make_document puts a start and an end token around the visual ones. Merged: 2x3 and 3 times 2x2.
GOLDEN: Content = (5, (1, 4, 6), 4, (3, 4, 4), 7)


@pytest.mark.parametrize(("config", "after_video"), [(PAPER, 18), (HF, 17)])
def test_golden_positions(config: object, after_video: int) -> None:
    document = make_document(HF, GOLDEN, seed=0)
    positions = FAMILY.positions(config, document.ids_T, document.media, (0, 0, 0))
    text = list(range(6))
    between = list(range(9, 15))  # end of the image, four text tokens, start of the video
    rest = list(range(after_video, after_video + 8))
    assert positions.dtype == np.int64
    assert positions.tolist() == [
        text + [6] * 6 + between + [15] * 4 + [16] * 4 + [17] * 4 + rest,
        text + [6, 6, 6, 7, 7, 7] + between + [15, 15, 16, 16] * 3 + rest,
        text + [6, 7, 8, 6, 7, 8] + between + [15, 16, 15, 16] * 3 + rest,
    ]


@pytest.mark.parametrize(("config", "after"), [(PAPER, 10), (HF, 3)])
def test_video_longer_than_its_sides(config: object, after: int) -> None:
    # Eight frames of one merged patch at 2: temporal positions 2 to 9, so that the next one is 10 by the paper.
    ids = np.array([7, 8, *[VIDEO] * 8, 9])
    positions = mrope_positions(config, ids, [(8, 2, 2)])  # type: ignore[arg-type]
    assert positions.tolist() == [
        [0, 1, *range(2, 10), after],
        [0, 1, *[2] * 8, after],
        [0, 1, *[2] * 8, after],
    ]


def test_text_counts_up_on_all_axes() -> None:
    assert mrope_positions(PAPER, np.arange(6, 12), []).tolist() == [list(range(6))] * 3


@pytest.mark.parametrize(
    "content",
    [
        *CONTENTS,
        GOLDEN,
        ((1, 2, 2),),
        (1, (5, 2, 6), 1, (1, 8, 2), 1, (1, 2, 2), 1, (2, 6, 4), 1),
        ((1, 4, 4), (1, 2, 6), 3),
    ],
    ids=str,
)
def test_hf_rule_is_transformers_rule(content: Content) -> None:
    document = make_document(HF, content, seed=0)
    with torch.device("meta"):
        model = oracle(HF)
    ids = torch.from_numpy(document.ids_T)[None]
    images, videos = (torch.tensor([m.grid for m in document.media if m.kind == k]) for k in ("image", "video"))
    expected, _ = model.model.get_rope_index(
        ids, (ids == IMAGE).int() + 2 * (ids == VIDEO).int(), image_grid_thw=images, video_grid_thw=videos
    )
    assert torch.equal(torch.from_numpy(document.positions_AT), expected[:, 0])


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([7, *[IMAGE] * 5, 9], [(1, 4, 6)], "expected 6 visual tokens at token 1 for a 1x2x3 grid"),
        ([7, *[IMAGE] * 7, 9], [(1, 4, 6)], "1 visual tokens belong to none of its 1 images"),
        ([7, *[IMAGE] * 6], [(1, 4, 6), (1, 2, 2)], "expected 1 visual tokens at token 7 for a 1x1x1 grid"),
        ([7, 8], [(1, 2, 2)], "expected 1 visual tokens at token 2 for a 1x1x1 grid"),
        ([7, *[VIDEO] * 4], [], "4 visual tokens belong to none of its 0 images"),
        (
            [IMAGE, 7, *[IMAGE] * 4],
            [(1, 2, 4), (1, 2, 6)],
            "expected 2 visual tokens at token 0 for a 1x1x2 grid",
        ),
    ],
)
def test_wrong_number_of_visual_tokens_is_named(
    ids: list[int], grids: list[tuple[int, int, int]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        mrope_positions(PAPER, np.array(ids), grids)


def test_golden_patch_order() -> None:
    positions = patch_positions(2, [media("image", (1, 4, 6), 2)])
    order = [(int(h), int(w)) for h, w in positions.T]
    blocks = [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]
    assert order[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert order == [(h + i, w + j) for h, w in blocks for i in (0, 1) for j in (0, 1)]


def test_every_frame_is_a_document_with_the_same_positions() -> None:
    shown = [media("video", (3, 2, 4), 2), media("image", (1, 4, 4), 2)]
    assert [one.frames for one in shown] == [(8, 8, 8), (16,)]
    positions = patch_positions(2, shown)
    one = patch_positions(2, [media("image", (1, 2, 4), 2)])
    other = patch_positions(2, [media("image", (1, 4, 4), 2)])
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.cat((one, one, one, other), dim=1))
    assert patch_positions(2, []).shape == (2, 0)
