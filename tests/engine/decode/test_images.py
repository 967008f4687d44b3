"""Image decoders: which is picked, and that all that are installed here give the same pixels where they promise it.

The oracle of a lossless format is what was written. Of JPEG, decoders may round differently (measured for DALI on the
CPU: not at all), so a few steps of 255 are allowed, less than a wrong colour space or upsampling would make.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tetrascope.engine.data.decode import images
from tetrascope.engine.data.decode.images import DECODERS, Decoder, installed, pick_decoder
from tetrascope.errors import UserError

INSTALLED = [name for name in DECODERS if installed(name)]


def picture() -> Image.Image:
    """Smooth in one corner, noisy in another, of odd size."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(61), 2 * np.arange(93))[..., None] + np.array([0, 40, 90])
    noise = rng.integers(0, 60, (61, 93, 3)) * (np.arange(93) > 50)[:, None]
    return Image.fromarray(((ramp + noise) % 256).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(3)  # decoders start at the beginning, wherever the file is
    return file


@pytest.mark.parametrize("name", INSTALLED)
def test_lossless_formats_give_what_was_written(name: str) -> None:
    decoder, image = pick_decoder(name), picture()
    grey, few = image.convert("L"), image.quantize(16)
    veiled = image.convert("RGBA")
    veiled.putalpha(grey)  # alpha is dropped, not blended
    cases = [(image, image), (veiled, image), (grey, grey.convert("RGB")), (few, few.convert("RGB"))]
    for source, expected in cases:
        found = decoder.decode(encoded(source, "PNG"))
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))
    for kind, options in [("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]:
        assert np.array_equal(np.asarray(decoder.decode(encoded(image, kind, **options))), np.asarray(image))


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"exif": True}])
def test_jpeg(name: str, options: dict[str, Any]) -> None:
    image = picture()
    if "exif" in options:
        exif = Image.Exif()
        exif[0x112] = 6  # stored turned by a quarter: not turned back, or the header's size would be wrong
        options = {"exif": exif}
    file = encoded(image, "JPEG", quality=90, **options)
    found = pick_decoder(name).decode(file)
    expected = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert found.mode == "RGB" and found.size == image.size
    difference = np.abs(np.asarray(found) - expected)
    assert difference.max() <= 4 and difference.mean() < 0.5


@pytest.mark.parametrize("name", INSTALLED)
def test_damaged_files_raise_what_pillow_raises(name: str) -> None:
    decoder = pick_decoder(name)
    for kind in ("JPEG", "PNG"):
        content = encoded(picture(), kind).getvalue()
        with pytest.raises(OSError, match="truncated"):
            decoder.decode(io.BytesIO(content[: len(content) // 2]))
    with pytest.raises(OSError, match="cannot identify"):
        decoder.decode(io.BytesIO(b"<html></html>"))


class StandIn:
    """In place of nvidia.dali.experimental.dynamic: writes down how it is called."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error, self.decoders = error, self

    def as_tensor(self, data: np.ndarray, device: str) -> bytes:
        assert data.dtype == np.uint8 and device == "cpu"
        return data.tobytes()

    def image(self, data: bytes, **options: Any) -> StandIn:
        self.calls.append({"data": data, **options})
        if self.error is not None:
            raise self.error
        return self

    def cpu(self) -> np.ndarray:
        return np.full((61, 93, 3), 7, np.uint8)


def test_dali_gets_jpegs_whole_and_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    dali = StandIn()
    monkeypatch.setattr(images, "_dali", lambda: dali)
    file = encoded(picture(), "JPEG")
    found = Decoder("dali", "mark", "cuda:3").decode(file)
    assert np.array_equal(np.asarray(found), dali.cpu())
    (call,) = dali.calls
    assert call["data"] == file.getvalue() and call["device"] == "gpu:3" and call["adjust_orientation"] is False
    Decoder("dali", "mark").decode(encoded(picture(), "PNG"))
    assert len(dali.calls) == 1


def test_a_jpeg_that_dali_cannot_decode_goes_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    dali = StandIn(RuntimeError("unsupported"))
    monkeypatch.setattr(images, "_dali", lambda: dali)
    file = encoded(picture(), "JPEG")
    found = Decoder("dali", "mark").decode(file)
    assert dali.calls and np.array_equal(np.asarray(found), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize(
    ("name", "there", "device", "picked"),
    [
        ("auto", True, "cuda:1", "dali"),
        ("auto", True, "cpu", "pillow"),
        ("auto", False, "cuda:1", "pillow"),
        ("dali", True, "cpu", "dali"),
        ("pillow", True, "cuda:1", "pillow"),
    ],
)
def test_which_is_picked(monkeypatch: pytest.MonkeyPatch, name: str, there: bool, device: str, picked: str) -> None:
    monkeypatch.setattr(images, "installed", lambda name: there or name == "pillow")
    decoder = pick_decoder(name, device)
    assert decoder.name == picked and decoder.device == device
    assert pickle.loads(pickle.dumps(decoder)) == decoder


def test_what_cannot_be_picked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "installed", lambda name: name == "pillow")
    with pytest.raises(UserError, match=r"data\.decoder: dali is not installed; run `pip install nvidia-dali-cuda130`"):
        pick_decoder("dali")
    with pytest.raises(UserError, match=r"no decoder is called 'opencv'; choose one of auto, dali, pillow"):
        pick_decoder("opencv")


def test_decoders_that_may_differ_have_different_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "installed", lambda name: True)
    decoders = [pick_decoder("pillow"), pick_decoder("dali"), pick_decoder("dali", "cuda:0")]
    assert len({decoder.mark for decoder in decoders}) == 3
    assert pick_decoder("dali", "cuda:0").mark == pick_decoder("dali", "cuda:5").mark
