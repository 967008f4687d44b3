"""Image decoders, and the registry that picks one.

A decoder turns an encoded image into RGB pixels, height and width as the header says: alpha is dropped, rotation
stored as metadata is ignored, of an animation the first frame is taken.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image

from tetrascope.errors import UserError

DALI_PACKAGE = "nvidia-dali-cuda130"
JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Decoder:
    """A decoder by name, on a device. Can be sent to another process.

    mark: changes when pixels may: decoders differ in rounding, and so may their versions and devices.
    """

    name: str
    mark: str
    device: str = "cpu"

    def decode(self, stream: BinaryIO) -> Image.Image:
        """The image in an open and seekable file, RGB.

        Raises what Pillow raises for files it cannot read, such as OSError, ValueError or SyntaxError.
        """
        stream.seek(0)
        return DECODERS[self.name](stream, self.device)


def pillow_decode(stream: BinaryIO, device: str) -> Image.Image:
    """Pillow: every format, on the CPU."""
    with Image.open(stream) as image:
        return image.convert("RGB")


def dali_decode(stream: BinaryIO, device: str) -> Image.Image:
    """NVIDIA DALI for JPEG: nvJPEG on a GPU, libjpeg-turbo on the CPU.

    Everything else goes to Pillow: a GPU would not help there (DALI's documentation of decoders.image), and pixels of
    16-bit PNGs would differ. So does a JPEG that DALI cannot decode; Pillow reads it or says what is wrong with it.
    """
    data = stream.read(len(JPEG))
    if data == JPEG:
        data += stream.read()
        dali = _dali()
        try:
            encoded = dali.as_tensor(np.frombuffer(data, np.uint8), device="cpu")
            pixels = dali.decoders.image(
                encoded,
                device=device.replace("cuda", "gpu"),
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg does, and so Pillow
            )
            return Image.fromarray(np.asarray(pixels.cpu()))
        except RuntimeError:
            pass
    stream.seek(0)
    return pillow_decode(stream, device)


@functools.cache
def _dali() -> Any:
    dali = importlib.import_module("nvidia.dali.experimental.dynamic")
    dali.set_num_threads(1)  # as many processes decode as there are cores for it
    return dali


DECODERS: dict[str, Callable[[BinaryIO, str], Image.Image]] = {"dali": dali_decode, "pillow": pillow_decode}
"""Image decoders by name. A new one is an entry here and a line in `installed`."""


def installed(name: str) -> bool:
    """Whether the decoder of that name can be used."""
    if name != "dali":
        return True
    try:
        return importlib.util.find_spec("nvidia.dali.experimental.dynamic") is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def pick_decoder(name: str = "auto", device: torch.device | str = "cpu") -> Decoder:
    """The decoder called `name`; for `auto` DALI where it is installed and `device` is a GPU, otherwise Pillow.

    On the CPU DALI gains nothing over Pillow: both decode with libjpeg-turbo, one image at a time.
    Raises UserError when no decoder has that name or it is not installed.
    """
    if name == "auto":
        name = "dali" if installed("dali") and torch.device(device).type == "cuda" else "pillow"
    if name not in DECODERS:
        raise UserError(f"data.decoder: no decoder is called {name!r}; choose one of auto, {', '.join(DECODERS)}")
    if not installed(name):
        raise UserError(f"data.decoder: {name} is not installed; run `pip install {DALI_PACKAGE}` or choose pillow")
    mark = f"pillow {PIL.__version__}"
    if name == "dali":
        mark = f"dali {_version(DALI_PACKAGE)} {torch.device(device).type}, {mark}"
    return Decoder(name, mark, str(device))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # built for another CUDA, under another name
        return "of unknown version"
