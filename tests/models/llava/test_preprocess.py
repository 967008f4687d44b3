"""Pictures to LLaVA's patch rows.

The oracles are transformers' CLIP processor for `crop` and its LLaVA processor, which pads for itself, for `pad`: pixel
for pixel. That a row holds the patch at its place is checked against CLIP's own embedding, a convolution.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tetrascope.errors import UserError
from tetrascope.models.llava import FAMILY
from tetrascope.models.llava.preprocess import LlavaMedia
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.tools.verify.families.llava import pixel_values, tiny_config

SIDE = 42
SIZE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
ORACLES = {"crop": CLIPImageProcessorPil(**SIZE), "pad": LlavaImageProcessorPil(**SIZE, do_pad=True)}
SIZES = [(42, 42), (100, 50), (50, 101), (7, 7), (1, 3), (43, 42), (640, 481), (41, 300)]


def processor(aspect: str) -> LlavaMedia:
    return LlavaMedia(dataclasses.replace(tiny_config(), aspect=aspect), DefaultMediaOptions())


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("aspect", ORACLES)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_transformers(aspect: str, size: tuple[int, int]) -> None:
    mine = processor(aspect)
    rows = mine.rows([picture(*size)], mine.image(*size, 1))
    expected = ORACLES[aspect](picture(*size), return_tensors="np")["pixel_values"]
    assert rows.dtype == np.float32 and rows.shape == (10, 588)
    assert np.array_equal(pixel_values(rows, tiny_config()).numpy(), expected)


def test_the_two_ways_differ() -> None:
    mine = [processor(aspect) for aspect in ("crop", "pad")]
    rows = [one.rows([picture(100, 50)], one.image(100, 50, 1)) for one in mine]
    assert np.abs(rows[0] - rows[1]).max() > 0.1
    # Padding is int(255 · mean), which normalises to almost nothing; a quarter of the height, above and below.
    top = pixel_values(rows[1], tiny_config())[0, :, :8]
    assert top.abs().max() < 0.02


def test_rows_are_the_class_token_then_patches_in_the_order_of_the_convolution() -> None:
    mine = processor("crop")
    rows = torch.from_numpy(mine.rows([picture(42, 42)], mine.image(42, 42, 1)))
    pixels = torch.from_numpy(ORACLES["crop"](picture(42, 42), return_tensors="np")["pixel_values"])
    kernel = torch.randn(32, 3, 14, 14)
    expected = torch.nn.functional.conv2d(pixels, kernel, stride=14).flatten(2)[0].T
    assert (rows[0] == 0).all()
    assert torch.allclose(rows[1:] @ kernel.view(32, -1).T, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_used_is_named() -> None:
    mine = processor("crop")
    for width, height in ((0, 5), (201, 1), (1, 201)):
        with pytest.raises(UserError, match=rf"image of {width}x{height} pixels"):
            mine.image(width, height, 1)
    with pytest.raises(UserError, match="llava takes no videos"):
        mine.video(8, 2.0, 64, 64)
    assert not FAMILY.media_options


@pytest.mark.parametrize("aspect", ORACLES)
def test_saved_processor_gives_the_same_pixels(aspect: str, tmp_path: Path) -> None:
    mine = processor(aspect)
    mine.save(str(tmp_path))
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": SIDE} and bool(saved.get("do_pad")) == (aspect == "pad")
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    rows = mine.rows([picture(100, 50)], mine.image(100, 50, 1))
    out = loaded(picture(100, 50), return_tensors="np")["pixel_values"]
    assert np.array_equal(out, pixel_values(rows, tiny_config()).numpy())
