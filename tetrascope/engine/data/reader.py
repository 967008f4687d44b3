"""Images and videos of a sample: sizes from headers, pixels when a step needs them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tetrascope.engine.data.sources.base import BadSample, Blob, MediaFile
from tetrascope.engine.data.store import Store, is_remote
from tetrascope.engine.data.video import BadVideo, VideoInfo, decode, probe
from tetrascope.errors import UserError
from tetrascope.models.family import MediaProcessor
from tetrascope.models.media import Media

BROKEN = (OSError, ValueError, SyntaxError)
"""What Pillow raises for files it cannot read; SyntaxError for some broken PNGs."""

SIGNATURES = {
    b"<!DOCTYPE": "an HTML page",
    b"<html": "an HTML page",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x1aE\xdf\xa3": "a Matroska video",
    b"{": "JSON",
}
"""First bytes of what is often found under the name of an image."""


class MediaReader:
    """Reads files for one family.

    patch: side of the encoder's patches in pixels. min_frames: frames that a video must have, if the user says so.
    pixel_limit: the largest image that is opened.
    """

    def __init__(
        self, processor: MediaProcessor, store: Store, patch: int, min_frames: int | None, pixel_limit: int
    ) -> None:
        self._processor, self._store = processor, store
        self._patch, self._min_frames, self._pixel_limit = patch, min_frames, pixel_limit

    def describe(self, files: Sequence[MediaFile]) -> tuple[Media, ...]:
        """What each file of a sample becomes, from headers alone.

        Raises BadSample for one that is missing, unreadable or unusable.
        """
        return tuple(self._describe(file, len(files)) for file in files)

    def _describe(self, file: MediaFile, files: int) -> Media:
        info = self._probe(file)
        if min(info.width, info.height) < self._patch:
            raise BadSample(
                "other",
                f"{file} has {info.width}x{info.height} pixels, less than the encoder's patches of "
                f"{self._patch}x{self._patch}; remove the sample or enlarge it",
            )
        try:
            if file.kind == "image":
                return self._processor.image(info.width, info.height, files)
            return self._processor.video(info.frames, info.fps, info.width, info.height)
        except UserError as error:
            raise BadSample("other", f"{file}: {error}") from error

    def _probe(self, file: MediaFile) -> VideoInfo:
        """An image counts as a video of one frame."""
        if file.kind == "image" or len(file.blobs) > 1:
            width, height = self._size(file, file.blobs[0])
            frames = len(file.blobs)
            info = VideoInfo(frames, file.fps, width, height, frames / file.fps)
        else:
            try:
                with self._store.open(file.blobs[0]) as stream:
                    info = probe(self._local(file.blobs[0]) or stream)
            except UserError as error:
                raise BadSample("broken video", f"{file}: {error}") from error
        if file.kind == "video" and info.frames < (self._min_frames or 1):
            raise BadSample("other", f"{file} has {info.frames} frames, at least {self._min_frames} are needed")
        return info

    def _local(self, blob: Blob) -> Path | None:
        """The path of a blob that is a whole local file."""
        whole = not is_remote(blob.url) and blob.data is None and not blob.offset and blob.size is None
        return Path(blob.url) if whole else None

    def _size(self, file: MediaFile, blob: Blob) -> tuple[int, int]:
        with self._store.open(blob) as stream:
            try:
                with _opened(stream) as image:
                    size = image.size
            except BROKEN as error:
                raise _no_image(file, blob, stream, error) from error
            except Image.DecompressionBombError as error:
                raise BadSample("image bomb", f"image {blob}: {error}") from error
        if size[0] * size[1] > self._pixel_limit:
            raise BadSample(
                "image bomb",
                f"image {blob} has {size[0]}x{size[1]} pixels, more than data.max_image_pixels={self._pixel_limit}",
            )
        return size

    def rows(self, file: MediaFile, media: Media) -> np.ndarray:
        """Patch rows float32 `[media.patches, P]`.

        Raises BadSample when the file cannot be decoded or is no longer what `describe` saw.
        """
        pictures = self.pictures(file, media)
        if any(picture.size != media.size for picture in pictures):
            raise BadSample("changed", f"{file} changed size since it was indexed")
        try:
            return self._processor.rows(pictures, media)
        except BROKEN as error:
            raise BadSample("other", f"{file}: {error}") from error

    def pictures(self, file: MediaFile, media: Media) -> list[Image.Image]:
        """The decoded picture, or the frames of a video that `media` names, RGB. Raises BadSample."""
        if file.kind == "image":
            return [self._picture(file, file.blobs[0])]
        if len(file.blobs) > 1:
            if max(media.numbers) >= len(file.blobs):
                raise BadSample("changed", f"{file} has fewer pictures than when it was indexed")
            return [self._picture(file, file.blobs[number]) for number in media.numbers]
        try:
            with self._store.open(file.blobs[0]) as stream:
                return decode(self._local(file.blobs[0]) or stream, media.numbers)
        except (BadVideo, UserError) as error:
            raise BadSample("broken video", f"{file}: {error}") from error

    def _picture(self, file: MediaFile, blob: Blob) -> Image.Image:
        with self._store.open(blob) as stream:
            try:
                with _opened(stream) as image:
                    return image.convert("RGB")
            except BROKEN as error:
                raise _no_image(file, blob, stream, error) from error
            except Image.DecompressionBombError as error:
                raise BadSample("image bomb", f"image {blob}: {error}") from error


def _opened(stream: BinaryIO) -> Image.Image:
    return Image.open(stream)


def _no_image(file: MediaFile, blob: Blob, stream: BinaryIO, error: Exception) -> BadSample:
    try:
        stream.seek(0, io.SEEK_SET)
        head = stream.read(16).lstrip()
    except (OSError, ValueError):
        head = b""
    found = next((what for signature, what in SIGNATURES.items() if head.startswith(signature)), None)
    found = "an MP4 video" if head[4:8] == b"ftyp" else found
    if found:
        return BadSample("wrong type", f"{file.kind} {blob} is {found}; replace it or remove the sample")
    return BadSample("not an image", f"{file.kind} {blob} is not readable ({error}); replace it or remove the sample")
