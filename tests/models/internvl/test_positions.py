"""Position ids, plain and V2PE, golden; and the places of a tile's patches.

The defect that V2PE's own code has is tried too: it counts in fp32, so that from position 65,536·stride on a picture
gets one position too few. Here positions are integers in units of 1/256 of a token.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from tetrascope.errors import UserError
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.config import InternVLConfig, framed, tiled
from tetrascope.models.internvl.positions import patch_order, vision_layout
from tetrascope.models.layers.positions import STRIDES, PositionRule
from tetrascope.models.media import Media
from tetrascope.tools.verify.families.internvl import IMAGE, Picture, make_document, tiny_config
from tetrascope.tools.verify.families.internvl_reference import v2pe_positions

DRAW = (0, 0, 0)


def full(rule: PositionRule | None = None) -> InternVLConfig:
    """With tiles of 256 tokens."""
    config = FAMILY.presets["internvl2-2b"]()
    return dataclasses.replace(config, positions=rule or PositionRule())


def tiles(config: InternVLConfig, n: int) -> Media:
    return tiled(config, (n, 1, 12), n)


def sample(config: InternVLConfig, *parts: int | Media) -> tuple[np.ndarray, list[Media]]:
    """Token ids of so many text tokens and of pictures and videos with their borders."""
    ids: list[int] = []
    media = []
    for part in parts:
        if isinstance(part, int):
            ids += [1] * part
            continue
        media.append(part)
        runs = [config.tile_tokens] * len(part.frames) if part.kind == "video" else [part.tokens]
        for run in runs:
            ids += [1, *[config.image_token_id] * run, 1]
    return np.array(ids), media


def tokens(config: InternVLConfig, *parts: int | Media, draw: tuple[int, int, int] = DRAW) -> list[Fraction]:
    """Positions in tokens."""
    ids, media = sample(config, *parts)
    found = FAMILY.positions(config, ids, media, draw)
    assert found.dtype == np.int64 and found.shape == (1, len(ids))
    return [Fraction(int(p), 256) for p in found[0]]


@pytest.mark.parametrize("rule", ["default", "v2pe_fix", "v2pe_rnd"])
def test_text_counts_from_zero(rule: str) -> None:
    assert tokens(full(PositionRule(rule, 64)), 20) == list(range(20))


def test_by_default_everything_is_counted_alike() -> None:
    config = full()
    assert tokens(config, 3, tiles(config, 2), 4, framed(config, 2), 1) == list(range(3 + 514 + 4 + 2 * 258 + 1))


@pytest.mark.parametrize(("n", "last"), [(1, 4 + 64), (3, 4 + 192), (13, 4 + 832)])
def test_a_picture_of_several_tiles_is_one_run(n: int, last: int) -> None:
    # Text 0…3 and <img> at 4; the tiles, the thumbnail the last of them, go on without a reset.
    config = full(PositionRule("v2pe_fix", 64))
    found = tokens(config, 4, tiles(config, n), 3)
    assert found[:5] == [0, 1, 2, 3, 4]
    assert found[5 : 5 + 256 * n] == [4 + Fraction(k, 4) for k in range(1, 256 * n + 1)]
    assert found[5 + 256 * n :] == [last + 1, last + 2, last + 3, last + 4]


def test_after_a_picture_the_next_whole_number() -> None:
    # Stride 1: 256 tokens end at 0 + 1; in a tiny tile of 4 tokens they end at a fraction, and </img> comes after its
    # ceiling.
    config = tiny_config("internlm2", PositionRule("v2pe_fix", 96))
    found = tokens(config, tiles(config, 1), 1)
    assert found == [0, Fraction(3, 8), Fraction(3, 4), Fraction(9, 8), Fraction(3, 2), 3, 4]


def test_every_frame_of_a_video_is_a_run_of_its_own() -> None:
    config = full(PositionRule("v2pe_fix", 16))
    found = tokens(config, framed(config, 2))
    frame = [Fraction(k, 16) for k in range(1, 257)]
    assert found == [0, *frame, 17, 18, *(18 + p for p in frame), 35]


@pytest.mark.parametrize("rule", [PositionRule(), PositionRule("v2pe_fix", 96), PositionRule("v2pe_fix", 1)])
def test_equal_to_the_references_count(rule: PositionRule) -> None:
    config = tiny_config("internlm2", rule)
    document = make_document(config, (3, Picture(2, 1), 4, Picture(1, 1), 6), 0)
    stride = rule.stride if rule.rule == "v2pe_fix" else 256
    expected = v2pe_positions((document.ids_T == IMAGE).tolist(), stride)
    assert (document.positions_AT[0] / 256).tolist() == expected.tolist()


def strides(config: InternVLConfig, images: int, draw: tuple[int, int, int]) -> list[int]:
    """The strides that were drawn: how far apart the first two tokens of every picture are."""
    ids, media = sample(config, *[tiles(config, 1)] * images)
    found = FAMILY.positions(config, ids, media, draw)[0]
    return [int(found[258 * i + 2] - found[258 * i + 1]) for i in range(images)]


def test_drawn_strides_depend_on_seed_sample_epoch_and_picture_alone() -> None:
    config = full(PositionRule("v2pe_rnd"))
    first = strides(config, 40, (3, 5, 0))
    assert first == strides(config, 40, (3, 5, 0))
    assert set(first) <= set(STRIDES) and len(set(first)) > 4  # differs between pictures
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert strides(config, 40, other) != first
    drawn = [stride for n in range(100) for stride in strides(config, 9, (0, n, 0))]
    assert all(abs(drawn.count(stride) - 100) < 50 for stride in STRIDES)  # 900 draws, 100 each; 5 sigma


def test_a_long_sample_keeps_every_step() -> None:
    # 1.05 million tokens of text bring the position beyond 65,536·16, where fp32 cannot hold steps of 1/16.
    config = full(PositionRule("v2pe_fix", 16))
    ids, media = sample(config, 16 * 65536 + 5, tiles(config, 12), 7)
    found = FAMILY.positions(config, ids, media, DRAW)[0]
    picture = found[16 * 65536 + 5 : 16 * 65536 + 5 + 1 + 12 * 256]
    assert len(found) == len(ids) > 1_000_000
    assert (np.diff(picture) == 16).all()
    assert found[-1] == (16 * 65536 + 5 + 12 * 16 + 8) * 256
    fp32 = picture.astype(np.float32) / np.float32(256)
    assert len(np.unique(fp32)) < len(picture)  # what the original counts with could not tell them apart


@pytest.mark.parametrize("length", [32768, 32769])
def test_where_the_checkpoint_would_change_its_rotary_base(length: int) -> None:
    published = FAMILY.presets["internvl2-2b"]()
    ids = np.ones(length, dtype=np.int64)
    for config in (
        dataclasses.replace(published, rope_scaling_factor=0.0),
        dataclasses.replace(published, positions=PositionRule("v2pe_fix", 64)),
    ):
        assert FAMILY.positions(config, ids, [], DRAW)[0, -1] == (length - 1) * 256
    if length > 32768:
        with pytest.raises(UserError, match="32769 tokens, beyond max_position_embeddings=32768"):
            FAMILY.positions(published, ids, [], DRAW)
    else:
        assert FAMILY.positions(published, ids, [], DRAW)[0, -1] == (length - 1) * 256


def test_visual_tokens_and_pictures_must_agree() -> None:
    config = tiny_config()
    ids, media = sample(config, 2, tiles(config, 2))
    for wrong in ([], [tiles(config, 1)], [tiles(config, 3)]):
        with pytest.raises(UserError, match="visual tokens"):
            FAMILY.positions(config, ids, wrong, DRAW)
    assert FAMILY.positions(config, ids, media, DRAW).shape == (1, len(ids))


def test_patches_come_in_blocks_of_two_by_two() -> None:
    assert patch_order(4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    layout = vision_layout(tiny_config(), [tiles(tiny_config(), 1), framed(tiny_config(), 2)])
    tile = [0, *(1 + n for n in patch_order(4).tolist())]
    assert layout.positions_KN.tolist() == [tile * 3]
    assert layout.picks_CV.tolist() == [list(range(12))] and layout.weights_CV is None
