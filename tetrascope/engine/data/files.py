"""The image and video files that a sample's messages name: sizes from headers, pixels when a step needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tetrascope.engine.data.video import BadVideo, VideoInfo, decode, probe
from tetrascope.errors import UserError
from tetrascope.models.family import MediaProcessor
from tetrascope.models.media import Media

BROKEN = (OSError, ValueError, SyntaxError)
"""What Pillow raises for files it cannot read; SyntaxError for some broken PNGs."""


class BadMedia(Exception):
    """An image or video whose pixels cannot be decoded; the message names the file."""


@dataclass(frozen=True)
class MediaFile:
    """An image, or a video: one file, or the pictures that are its frames, shown `fps` times a second."""

    kind: str
    paths: tuple[Path, ...]
    fps: float = 1.0

    @property
    def source(self) -> Path | tuple[Path, ...]:
        return self.paths[0] if len(self.paths) == 1 else self.paths


def media_files(messages: Sequence[Any], folder: Path) -> list[MediaFile]:
    """The files that the messages name, in order: content parts with an "image" or a "video".

    Paths are relative to `folder`. Raises UserError when one is no path.
    """
    found = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = _kind(part)
            if kind is not None:
                found.append(_file(kind, part, folder))
    return found


def _kind(part: Any) -> str | None:
    if not isinstance(part, dict):
        return None
    if part.get("type") in ("image", "video"):
        return str(part["type"])
    return next((kind for kind in ("image", "video") if kind in part), None)


def _file(kind: str, part: dict[str, Any], folder: Path) -> MediaFile:
    value = part.get(kind)
    paths = value if kind == "video" and isinstance(value, list) else [value]
    named = [path for path in paths if isinstance(path, str) and path]
    if not named or len(named) != len(paths):
        raise UserError(f'"{kind}" is {value!r}; expected the path of a file')
    fps = part.get("fps", 1.0)
    if not isinstance(fps, (int, float)) or not fps > 0:
        raise UserError(f'"fps" is {fps!r}; expected how many of the pictures are shown a second')
    return MediaFile(kind, tuple(folder / path for path in named), float(fps))


class MediaReader:
    """Reads files for one family. Headers are read once a file.

    patch: side of the encoder's patches in pixels. min_frames: frames that a video must have, if the user says so.
    """

    def __init__(self, processor: MediaProcessor, patch: int, min_frames: int | None) -> None:
        self._processor, self._patch, self._min_frames = processor, patch, min_frames
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._videos: dict[tuple[Path, ...], VideoInfo] = {}

    def describe(self, files: Sequence[MediaFile]) -> tuple[Media, ...]:
        """What each file of a sample becomes. Raises UserError for one that is missing, unreadable or unusable."""
        return tuple(self._describe(file, len(files)) for file in files)

    def _describe(self, file: MediaFile, files: int) -> Media:
        if file.kind == "image":
            width, height = self._size(file.paths[0])
            self._check_size(file, width, height)
            try:
                return self._processor.image(width, height, files)
            except UserError as error:
                raise UserError(f"image {file.paths[0]}: {error}") from error
        if file.paths not in self._videos:
            self._videos[file.paths] = probe(file.source, fps=file.fps, at_least=self._min_frames or 1)
        info = self._videos[file.paths]
        self._check_size(file, info.width, info.height)
        try:
            return self._processor.video(info.frames, info.fps, info.width, info.height)
        except UserError as error:
            raise UserError(f"video {file.paths[0]}: {error}") from error

    def _check_size(self, file: MediaFile, width: int, height: int) -> None:
        if min(width, height) < self._patch:
            raise UserError(
                f"{file.kind} {file.paths[0]} has {width}x{height} pixels, less than the encoder's patches of "
                f"{self._patch}x{self._patch}; remove the sample or enlarge it"
            )

    def _size(self, path: Path) -> tuple[int, int]:
        if path not in self._sizes:
            try:
                with Image.open(path) as image:
                    self._sizes[path] = image.size
            except FileNotFoundError as error:
                raise UserError(f"image {path} does not exist; fix the path or remove the sample") from error
            except (*BROKEN, Image.DecompressionBombError) as error:
                raise UserError(f"image {path} is not readable ({error}); replace it or remove the sample") from error
        return self._sizes[path]

    def rows(self, file: MediaFile, media: Media) -> np.ndarray:
        """Patch rows float32 `[media.patches, P]`.

        Raises BadMedia when the file cannot be decoded or is no longer what `describe` saw.
        """
        try:
            if file.kind == "video":
                pictures = decode(file.source, media.numbers)
            else:
                with Image.open(file.paths[0]) as image:
                    pictures = [image.convert("RGB")]
            if any(picture.size != media.size for picture in pictures):
                raise BadMedia(f"{file.kind} {file.paths[0]} changed size since training began")
            return self._processor.rows(pictures, media)
        except (*BROKEN, BadVideo) as error:
            raise BadMedia(f"{file.kind} {file.paths[0]}: {error}") from error
