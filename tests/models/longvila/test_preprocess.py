"""Pictures and videos to patch rows.

The oracle for pixels is transformers' SigLIP processor, to the last bit; the rows must be those pixels, patch by patch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tetrascope.errors import UserError
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import clip
from tetrascope.models.longvila.preprocess import LongVilaMedia
from tetrascope.models.media import DefaultMediaOptions

CONFIG = FAMILY.presets["1.5b"]()


def processor(**options: float) -> LongVilaMedia:
    return LongVilaMedia(CONFIG, DefaultMediaOptions(**options))  # type: ignore[arg-type]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(384, 384), (640, 213), (7, 500), (1, 1)])
def test_rows_are_the_processors_pixels(size: tuple[int, int]) -> None:
    media = processor().image(*size, images=1)
    rows = processor().rows([photo(*size)], media)
    reference = SiglipImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    pixels = reference(photo(*size), return_tensors="np")["pixel_values"][0]
    assert rows.shape == (media.patches, 588) == (729, 588) and rows.dtype == np.float32
    for i in (0, 1, 26, 27, 400, 728):
        y, x = i // 27 * 14, i % 27 * 14
        assert np.array_equal(rows[i].reshape(3, 14, 14), pixels[:, y : y + 14, x : x + 14])


def test_channels_and_scale() -> None:
    # By hand: 255 -> 1, 0 -> -1, 51 -> 0.2·2 - 1 = -0.6; the resize of one colour is that colour.
    rows = processor().rows([Image.new("RGB", (50, 20), (255, 0, 51))], processor().image(50, 20, 1))
    assert np.allclose(rows.reshape(729, 3, 196), np.array([1, -1, -0.6])[None, :, None], atol=1e-6)


def test_transparent_pictures_lie_on_white() -> None:
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert processor().rows([picture], processor().image(40, 40, 1)).min() == 1.0


def test_frames_of_a_video_follow_each_other() -> None:
    frames = [photo(60, 40, seed) for seed in range(3)]
    rows = processor().rows(frames, clip(CONFIG, (0, 1, 2), size=(60, 40)))
    one = processor().image(60, 40, 1)
    assert np.array_equal(rows, np.concatenate([processor().rows([frame], one) for frame in frames]))


def test_how_many_frames() -> None:
    # Golden: ten seconds at 30 a second.
    media = processor().video(300, 30.0, 320, 240)
    assert media.numbers == (0, 43, 85, 128, 171, 214, 256, 299) and media.tokens == 8 * 196
    assert media.times[1] == 43 / 30 and media.size == (320, 240)
    assert len(processor(max_frames=256).video(300, 30.0, 320, 240).numbers) == 256
    assert processor(max_frames=256).video(5, 30.0, 320, 240).numbers == (0, 1, 2, 3, 4), "each once"


def test_frames_a_second() -> None:
    # LongVILA's stage 5: two a second, at most 256; a longer video is spread over these.
    assert len(processor(fps=2.0, max_frames=256).video(300, 30.0, 320, 240).numbers) == 20
    long = processor(fps=2.0, max_frames=256).video(30 * 600, 30.0, 320, 240)
    assert len(long.numbers) == 256 and long.numbers[0] == 0 and long.numbers[-1] == 17999
    assert processor(fps=2.0).video(12, 30.0, 320, 240).numbers == (0, 11), "two at least"
    assert processor(fps=2.0).video(1, 30.0, 320, 240).numbers == (0,)
    assert len(processor(fps=100.0, max_frames=64).video(9, 10.0, 320, 240).numbers) == 9


def test_what_cannot_be_shown() -> None:
    with pytest.raises(UserError, match="0x3 pixels, expected at least 1x1"):
        processor().image(0, 3, 1)
    with pytest.raises(UserError, match="0 frames"):
        processor().video(0, 30.0, 320, 240)


def test_the_processors_file_lies_with_the_tower(tmp_path: Path) -> None:
    processor().save(str(tmp_path))
    saved = json.loads((tmp_path / "vision_tower" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 384, "width": 384} and saved["image_mean"] == saved["image_std"] == [0.5] * 3
    assert saved["resample"] == 3 and saved["do_resize"] and saved["do_normalize"]
    again = SiglipImageProcessorPil.from_pretrained(tmp_path / "vision_tower")
    picture = photo(100, 70)
    pixels = again(picture, return_tensors="np")["pixel_values"][0]
    row = processor().rows([picture], processor().image(100, 70, 1))[0]
    assert np.array_equal(row.reshape(3, 14, 14), pixels[:, :14, :14])
