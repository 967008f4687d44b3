"""How features become tokens: by index and weight, against torch's own operators on random features.

The oracle is torch.nn.functional.interpolate and slicing of whole maps, and the token counts of transformers'
processor (golden numbers). A crop in the wrong order, a border too wide or a weight of another neighbour shows at once.
"""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tetrascope.errors import UserError
from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.deliver import Deliver
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.vlm import pick_features
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.llava_onevision.config import PINPOINTS, SIGLIP
from tetrascope.models.llava_onevision.views import anyres_media, layout, pooled, shrink, single_media, video_media
from tetrascope.models.media import Media

SIDE, WIDTH = 27, 8


def assembled(media: list[Media], features_FH: Tensor, newline_H: Tensor) -> Tensor:
    """The visual tokens that the model makes of these features."""
    plan = layout(SIGLIP, 9, media)
    tokens = plan.picks_CV.shape[1]
    assert tokens == sum(one.tokens for one in media)
    assert plan.positions_KN.shape == (1, sum(one.features for one in media))
    inputs = VisionInputs(
        patches_NP=torch.empty(0),
        positions_KN=plan.positions_KN,
        here_KN=plan.positions_KN,
        frames=Packed((len(features_FH),)),
        windows=None,
        features=sum(one.features for one in media),
        rows_M=torch.arange(tokens),
        picks_CM=plan.picks_CV,
        weights_CM=plan.weights_CV,
    )
    return pick_features(Deliver()([features_FH], inputs)[0], inputs, newline_H)


def expected_image(one: Media, features_FH: Tensor, newline_H: Tensor, tolerance: float = 1e-7) -> Tensor:
    """Base view, then the map of crops: joined, cut, shrunk and ended with newlines by torch's operators."""
    rows, columns = one.grid
    width, height = one.size
    base, crops = features_FH[: SIDE**2], features_FH[SIDE**2 :]
    plane = crops.reshape(rows, columns, SIDE, SIDE, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    h, w = plane.shape[1:]
    if width / height > w / h:
        cut = (h - int(round(height * (w / width), 7))) // 2
        plane = plane[:, cut : h - cut]
    else:
        cut = (w - int(round(width * (h / height), 7))) // 2
        plane = plane[:, :, cut : w - cut]
    h, w = plane.shape[1:]
    ratio = math.sqrt(h * w / (9 * SIDE**2))
    if ratio > 1.1:
        plane = F.interpolate(plane[None], (int(h // ratio), int(w // ratio)), mode="bilinear")[0]
    lines = torch.cat((plane, newline_H[:, None, None].expand(-1, plane.shape[1], 1)), dim=2)
    return torch.cat((base, lines.flatten(1).T))


# (width, height): tokens by transformers' LlavaOnevisionProcessor._get_number_of_features
GOLDEN = {(384, 384): 1485, (640, 480): 2929, (1920, 1080): 7269, (2304, 2304): 7371, (300, 1000): 2835, (37, 41): 1431}


@pytest.mark.parametrize("size", GOLDEN, ids=str)
def test_tokens_of_an_image(size: tuple[int, int]) -> None:
    one = anyres_media(SIGLIP, PINPOINTS, 9, *size)
    assert one.tokens == GOLDEN[size]
    assert one.features == one.patches == len(one.frames) * SIDE**2
    features, newline = torch.randn(one.features, WIDTH), torch.randn(WIDTH)
    found = assembled([one], features, newline)
    expected = expected_image(one, features, newline)
    # Rounding of a sum of four products; torch adds pairs first.
    assert (found - expected).abs().max() <= 1e-6
    if one.tokens < 7000:  # nothing is shrunk: the very same numbers, and no weights at all
        assert torch.equal(found, expected)
        assert layout(SIGLIP, 9, [one]).weights_CV is None


@pytest.mark.parametrize(
    ("old", "new"), [((27, 27), (14, 14)), ((162, 162), (81, 81)), ((93, 162), (61, 107)), ((5, 7), (4, 6))]
)
def test_shrinking_is_torchs_bilinear(old: tuple[int, int], new: tuple[int, int]) -> None:
    picks, weights = shrink(np.arange(math.prod(old)).reshape(old), new)
    assert weights.dtype == np.float32 and np.allclose(weights.sum(0), 1, atol=1e-6)
    assert weights.min() >= 0 and picks.max() < math.prod(old)
    plane = torch.randn(3, *old, dtype=torch.float32)
    expected = F.interpolate(plane[None], new, mode="bilinear", align_corners=False)[0]
    found = (plane.flatten(1)[:, torch.from_numpy(picks)] * torch.from_numpy(weights)).sum(1)
    assert (found - expected).abs().max() <= 1e-6


def test_weights_are_the_very_ones_of_torch() -> None:
    # Shrinking a unit vector for each of the old points shows torch's weights, without any sum.
    for old, new in ((27, 14), (93, 61), (162, 107), (162, 81), (150, 149), (5, 4), (3, 2), (2, 1)):
        expected = F.interpolate(torch.eye(old)[None, :, :, None], (new, 1), mode="bilinear")[0, :, :, 0]
        picks, weights = shrink(np.arange(old)[:, None], (new, 1))
        found = np.zeros((old, new), dtype=np.float32)
        for taps, own in zip(picks, weights, strict=True):
            np.add.at(found, (taps[:, 0], np.arange(new)), own[:, 0])
        assert torch.equal(torch.from_numpy(found), expected), (old, new)


def test_a_video_is_pooled_frame_by_frame_and_ends_with_one_newline() -> None:
    one = video_media(SIGLIP, (0, 10, 20))
    assert one.tokens == 3 * 196 + 1 and one.features == 3 * 729 and one.grid == (3, 14, 14)
    features, newline = torch.randn(one.features, WIDTH), torch.randn(WIDTH)
    maps = features.reshape(3, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, (14, 14), mode="bilinear").permute(0, 2, 3, 1).reshape(-1, WIDTH)
    found = assembled([one], features, newline)
    assert (found[:-1] - expected).abs().max() <= 1e-6
    assert torch.equal(found[-1], newline)


def test_images_and_videos_of_a_micro_batch_follow_each_other() -> None:
    media = [
        single_media(SIGLIP, True, 10, 20),
        anyres_media(SIGLIP, PINPOINTS, 9, 1920, 1080),
        video_media(SIGLIP, (0, 5)),
        single_media(SIGLIP, False, 10, 20),
        anyres_media(SIGLIP, PINPOINTS, 9, 640, 480),
    ]
    newline = torch.randn(WIDTH)
    features = torch.randn(sum(one.features for one in media), WIDTH)
    found = assembled(media, features, newline).split([one.tokens for one in media])
    alone = features.split([one.features for one in media])
    for part, one, own in zip(found, media, alone, strict=True):
        assert torch.equal(part, assembled([one], own, newline))
    assert torch.equal(found[0], torch.cat((alone[0], newline[None])))
    assert torch.equal(found[3], alone[3])


def test_features_of_padding_rows_are_not_the_newline() -> None:
    # Under tensor parallelism rows are padded to divide, and every row gives a feature.
    one, newline = single_media(SIGLIP, True, 10, 20), torch.randn(WIDTH)
    features = torch.randn(one.features + 3, WIDTH)
    assert torch.equal(assembled([one], features, newline), torch.cat((features[:-3], newline[None])))


def test_places_count_anew_in_every_view() -> None:
    config = FAMILY.presets["0.5b"]()
    plan = FAMILY.vision_layout(config, [anyres_media(SIGLIP, PINPOINTS, 9, 384, 384), video_media(SIGLIP, (0,))])
    assert torch.equal(plan.positions_KN, torch.arange(729).repeat(3)[None])


def test_sides_are_pooled_up() -> None:
    assert [pooled(side) for side in (2, 3, 27, 28)] == [1, 2, 14, 14]


def test_gradients_of_shrunk_features_are_those_of_torch() -> None:
    one = anyres_media(SIGLIP, PINPOINTS, 9, 1500, 1300)
    features, newline = torch.randn(one.features, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    after = torch.randn(one.tokens, 2)
    found = torch.autograd.grad((assembled([one], features, newline) * after).sum(), (features, newline))
    expected = torch.autograd.grad((expected_image(one, features, newline) * after).sum(), (features, newline))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_an_image_that_fits_no_canvas_is_refused() -> None:
    with pytest.raises(UserError, match="too narrow"):
        anyres_media(SIGLIP, PINPOINTS, 9, 5000, 1)


def test_a_large_micro_batch_is_laid_out_quickly() -> None:
    # Computed for every micro-batch: it must cost nothing beside decoding the pictures.
    media = [anyres_media(SIGLIP, PINPOINTS, 9, 2304, 2304), video_media(SIGLIP, tuple(range(32)))]
    start = time.perf_counter()
    layout(SIGLIP, 9, media)
    assert time.perf_counter() - start < 0.5


def test_a_typical_picture_is_two_by_two_crops() -> None:
    config = FAMILY.presets["7b"]()
    assert config.typical.grid == (2, 2) and config.typical.tokens == 729 + 54 * 55
    small = dataclasses.replace(config, pinpoints=((384, 384),))
    assert small.typical.grid == (1, 1)
