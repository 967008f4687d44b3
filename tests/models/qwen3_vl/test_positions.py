"""M-RoPE positions and patch positions of Qwen3-VL: golden numbers, and transformers' own `get_rope_index`.

A mistake here is invisible in shapes and nearly invisible in the loss of an untrained model.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen3_vl import FAMILY
from tetrascope.models.qwen3_vl.positions import vision_layout
from tetrascope.tools.verify.families.qwen3_vl import CONTENTS, IMAGE, VIDEO, make_document, oracle, tiny_config

Content = tuple[int | tuple[int, int, int], ...]

CONFIG = tiny_config()

# Five text tokens, an image of 4x6 patches, four text tokens, a video of three steps of 4x4 patches, seven text
# tokens; make_document puts a start and an end token around the visual ones, and two text tokens (the time) before
# each step. Merged: 2x3 and three times 2x2.
GOLDEN: Content = (5, (1, 4, 6), 4, (3, 4, 4), 7)


def test_golden_positions() -> None:
    document = make_document(CONFIG, GOLDEN, seed=0)
    text = list(range(6))
    between = list(range(9, 16))  # end of the image, four text tokens, time of the first step
    # Start 16; the step's tokens at 17 and 18 on two axes; its end is 19, the next time 20 and 21, its start 22 …
    steps_t = [16, *[17] * 4, 19, 20, 21, 22, *[23] * 4, 25, 26, 27, 28, *[29] * 4]
    steps_h = [16, 17, 17, 18, 18, 19, 20, 21, 22, 23, 23, 24, 24, 25, 26, 27, 28, 29, 29, 30, 30]
    steps_w = [16, 17, 18, 17, 18, 19, 20, 21, 22, 23, 24, 23, 24, 25, 26, 27, 28, 29, 30, 29, 30]
    rest = list(range(31, 39))
    assert document.positions_AT.dtype == np.int64
    assert document.positions_AT.tolist() == [
        [*text, *[6] * 6, *between, *steps_t, *rest],
        [*text, 6, 6, 6, 7, 7, 7, *between, *steps_h, *rest],
        [*text, 6, 7, 8, 6, 7, 8, *between, *steps_w, *rest],
    ]


@pytest.mark.parametrize(
    "content",
    [
        *CONTENTS,
        GOLDEN,
        ((1, 2, 2),),
        (1, (5, 2, 6), 1, (1, 8, 2), 1, (1, 2, 2), 1, (2, 6, 4), 1),
        ((1, 4, 4), (1, 2, 6), 3),
        ((8, 2, 2), (2, 4, 2), 3),
    ],
    ids=str,
)
def test_they_are_transformers(content: Content) -> None:
    document = make_document(CONFIG, content, seed=0)
    with torch.device("meta"):
        model = oracle(CONFIG)
    ids = torch.from_numpy(document.ids_T)[None]
    grids = {k: torch.tensor([m.grid for m in document.media if m.kind == k]) for k in ("image", "video")}
    expected, _ = model.model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        image_grid_thw=grids["image"] if len(grids["image"]) else None,
        video_grid_thw=grids["video"] if len(grids["video"]) else None,
    )
    assert torch.equal(torch.from_numpy(document.positions_AT), expected[:, 0])


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([7, *[IMAGE] * 5, 9], [(1, 4, 6)], "expected 6 visual tokens at token 1 for a 1x2x3 grid"),
        ([7, *[VIDEO] * 4, 9], [(2, 4, 4)], "expected 4 visual tokens at token 6 for a 1x2x2 grid"),
        ([7, *[VIDEO] * 4], [], "4 visual tokens belong to none of its 0 images"),
    ],
)
def test_wrong_number_of_visual_tokens_is_named(
    ids: list[int], grids: list[tuple[int, int, int]], message: str
) -> None:
    shown = [media("video" if grid[0] > 1 else "image", grid, 2) for grid in grids]
    with pytest.raises(UserError, match=message):
        FAMILY.positions(CONFIG, np.array(ids), shown, (0, 0, 0))


def test_patches_know_their_place_and_the_size_of_their_picture() -> None:
    shown = [media("video", (2, 2, 4), 2), media("image", (1, 4, 2), 2)]
    layout = vision_layout(CONFIG, shown)
    assert layout.positions_KN.dtype == torch.int64
    assert layout.positions_KN.tolist() == [
        [0, 0, 1, 1, 0, 0, 1, 1] * 2 + [0, 0, 1, 1, 2, 2, 3, 3],
        [0, 1, 0, 1, 2, 3, 2, 3] * 2 + [0, 1] * 4,
        [2] * 16 + [4] * 8,
        [4] * 16 + [2] * 8,
    ]
    assert layout.picks_CV.tolist() == [list(range(6))] and layout.weights_CV is None
    assert vision_layout(CONFIG, []).positions_KN.shape == (4, 0)
