"""How a picture is cut.

Oracle for pixels: transformers' image processors without torchvision, normalisation included, equal to the last bit
(both resize 8-bit pixels with Pillow and round at the same places). Oracle for geometry: golden token counts of
LLaVA-OneVision, transformers' model code for what is cut off the features, and its tiling rule.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tetrascope.errors import UserError
from tetrascope.models.layers import tiles

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_sizes(n: int, low: int = 20, high: int = 3000) -> list[tuple[int, int]]:
    drawn = np.random.default_rng(1).integers(low, high, (n, 2))
    return [(384, 384), (640, 480), (1920, 1080), (2304, 2304), *((int(w), int(h)) for w, h in drawn)]


# --- AnyRes


@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(384, 384, 1485), (480, 640, 2929), (1080, 1920, 7269), (2304, 2304, 7371)]
)
def test_golden_token_counts(height: int, width: int, tokens: int) -> None:
    assert tiles.anyres_tokens(width, height, PINPOINTS) == tokens


@pytest.mark.parametrize(
    "pinpoints", [PINPOINTS, PINPOINTS[::-1], [[384, 768], [768, 384], [768, 768], [384, 1152], [1152, 384]]]
)
def test_anyres_geometry_is_that_of_transformers(pinpoints: list[list[int]]) -> None:
    for width, height in random_sizes(150):
        grid = tiles.anyres_grid(width, height, pinpoints)
        assert grid == get_anyres_image_grid_shape((height, width), pinpoints, 384), (width, height)
        rows, columns = grid[0] * 27, grid[1] * 27
        features = torch.arange(rows * columns).view(1, rows, columns)
        kept_rows, kept_columns = tiles.unpad_crop(width, height, rows, columns)
        theirs = unpad_image(features, (height, width))
        assert torch.equal(features[:, kept_rows, kept_columns], theirs), (width, height)


def test_token_counts_are_those_of_transformers() -> None:
    # The processor cannot be constructed without torchvision; its counting needs only these of its attributes.
    this = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=PINPOINTS),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    this._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, this)
    for width, height in random_sizes(150):
        expected = LlavaOnevisionProcessor._get_number_of_features(this, height, width, 384, 384)
        assert tiles.anyres_tokens(width, height, PINPOINTS) == expected, (width, height)


def test_downsampling_starts_above_1_1() -> None:
    # 9 views of 27²: r² = rows·columns / 6561; 81·1.1 = 89.1
    assert tiles.downsampled(81, 81) == (81, 81)
    assert tiles.downsampled(89, 89) == (89, 89)
    assert tiles.downsampled(90, 90) == (80, 80)  # 90 // 1.1111111111111112, not 81: as the original computes it
    assert tiles.downsampled(54, 162) == (46, 140)  # r = 1.1547
    assert tiles.downsampled(48, 162) == (48, 162)  # r = 1.0887
    assert tiles.downsampled(162, 162) == (81, 81)


@pytest.mark.parametrize(
    ("width", "height", "mode"),
    [
        (384, 384, "RGB"),
        (640, 480, "RGB"),
        (480, 641, "RGB"),
        (100, 30, "L"),
        (410, 900, "RGB"),
        (900, 410, "RGB"),
        (50, 50, "RGBA"),
    ],
)
def test_anyres_pixels_are_those_of_transformers(width: int, height: int, mode: str) -> None:
    image = picture(width, height, mode)
    processor = LlavaOnevisionImageProcessorPil(image_mean=HALF, image_std=HALF)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    views = tiles.anyres_views(image, PINPOINTS)
    rows, columns = tiles.anyres_grid(width, height, PINPOINTS)
    assert len(views) == 1 + rows * columns
    assert np.array_equal(tiles.normalized(views, HALF, HALF), expected)


def test_several_pictures_are_padded_to_squares_as_transformers_does() -> None:
    images = [picture(300, 200), picture(200, 301), picture(90, 90)]
    processor = LlavaOnevisionImageProcessorPil(image_mean=HALF, image_std=HALF)
    expected = processor([images], return_tensors="np")["pixel_values"][:, 0]
    squares = [tiles.pad_to_square(image, HALF).resize((384, 384), tiles.BICUBIC) for image in images]
    assert np.array_equal(tiles.normalized(squares, HALF, HALF), expected)


# --- InternVL


@pytest.mark.parametrize(("min_tiles", "max_tiles"), [(1, 12), (1, 6), (2, 5), (1, 1), (3, 24)])
def test_dynamic_grid_is_that_of_transformers(min_tiles: int, max_tiles: int) -> None:
    for width, height in [*random_sizes(200), (448, 448), (896, 448), (634, 634), (633, 633), (300, 300)]:
        expected = get_optimal_tiled_canvas((height, width), (448, 448), min_tiles, max_tiles)
        assert tiles.dynamic_grid(width, height, min_tiles, max_tiles, rule="hf") == expected
        assert tiles.dynamic_grid(width, height, min_tiles, max_tiles) == expected


def test_ties_are_settled_by_area() -> None:
    # 1x1, 2x2 and 3x3 are equally near to a square: one tile more is taken from half of its pixels on.
    assert tiles.dynamic_grid(633, 633) == (1, 1)  # 633² = 400689 < 0.5·448²·4 = 401408
    assert tiles.dynamic_grid(634, 634) == (2, 2)
    assert tiles.dynamic_grid(950, 950) == (2, 2)  # 902500 < 0.5·448²·9 = 903168
    assert tiles.dynamic_grid(951, 951) == (3, 3)


def test_the_two_rules_differ_on_equal_areas_only() -> None:
    # 5:2 is as far from 4:1 as from 2:2. Which comes first in a Python set of the grids decides in the original.
    assert tiles.dynamic_grid(5, 2, 4, 4, rule="original") == (4, 1)
    assert tiles.dynamic_grid(5, 2, 4, 4, rule="hf") == (2, 2)
    for low, high in [(1, 6), (1, 12), (1, 16), (1, 24), (3, 5), (4, 4)]:
        pairs = ((i, j) for n in range(low, high + 1) for i in range(1, n + 1) for j in range(1, n + 1))
        grids = {pair for pair in pairs if low <= pair[0] * pair[1] <= high}
        in_the_original_order = sorted(grids, key=lambda grid: grid[0] * grid[1])
        assert list(tiles._grids(low, high, "original")) == in_the_original_order
        assert set(tiles._grids(low, high, "hf")) == grids


@pytest.mark.parametrize(
    ("width", "height", "low", "high", "mode"),
    [(448, 448, 1, 12, "RGB"), (900, 450, 1, 12, "RGB"), (300, 500, 1, 6, "L"), (60, 20, 2, 4, "RGBA")],
)
def test_tiles_are_those_of_transformers(width: int, height: int, low: int, high: int, mode: str) -> None:
    image = picture(width, height, mode)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=low, max_patches=high
    )
    expected = processor(image, return_tensors="np")
    ours = tiles.dynamic_tiles(image, low, high)
    assert [len(ours)] == list(expected["num_patches"])
    assert np.array_equal(tiles.normalized(ours, CLIP_MEAN, CLIP_STD), expected["pixel_values"])
    if len(ours) > 1:
        assert len(tiles.dynamic_tiles(image, low, high, thumbnail=False)) == len(ours) - 1


# --- what is left to transformers' own processors


def test_llava_pads_then_clip_resizes() -> None:
    image = picture(500, 300)
    square = tiles.pad_to_square(image, CLIP_MEAN)
    assert square.size == (500, 500) and square.getpixel((0, 0)) == (122, 116, 104)
    assert np.array_equal(np.asarray(square)[100:400], np.asarray(image))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    pixels = clip(square, return_tensors="np")["pixel_values"]
    resized = square.resize((336, 336), tiles.BICUBIC)
    assert np.array_equal(pixels, tiles.normalized([resized], CLIP_MEAN, CLIP_STD))
    padding = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    assert np.array_equal(padding(image, return_tensors="np")["pixel_values"], pixels)


def test_siglip_stretches_to_384() -> None:
    image = picture(500, 300)
    siglip = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC)
    pixels = siglip(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels, tiles.normalized([image.resize((384, 384), tiles.BICUBIC)], HALF, HALF))


# --- patch rows


def test_rows_times_weights_are_a_convolution() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 20, kernel_size=14, stride=14, dtype=torch.float64)
    images = torch.randn(2, 3, 28, 42, dtype=torch.float64)
    rows = torch.from_numpy(tiles.patchify(images.numpy(), 14))
    assert rows.shape == (2 * 2 * 3, 3 * 14 * 14)
    ours = rows @ conv.weight.view(20, -1).T + conv.bias
    theirs = conv(images).flatten(2).transpose(1, 2).reshape(-1, 20)
    assert (ours - theirs).abs().max() < 1e-12  # fp64, sums of 588


# --- errors


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="0x5 pixels"):
        tiles.select_resolution(0, 5, PINPOINTS)
    with pytest.raises(UserError, match="5x0 pixels"):
        tiles.dynamic_grid(5, 0)
    with pytest.raises(UserError, match="is empty"):
        tiles.select_resolution(5, 5, [])
    with pytest.raises(UserError, match="too narrow"):
        tiles.select_resolution(1, 100_000, PINPOINTS)
    with pytest.raises(UserError, match="multiples of the ViT's 336"):
        tiles.anyres_grid(5, 5, [[384, 384]], crop=336)
    with pytest.raises(UserError, match="min_tiles = 3 and max_tiles = 2"):
        tiles.dynamic_grid(5, 5, 3, 2)
    with pytest.raises(UserError, match="multiples of the ViT's patch of 14"):
        tiles.patchify(np.zeros((1, 3, 28, 30), np.float32), 14)
