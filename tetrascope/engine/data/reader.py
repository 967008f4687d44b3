"""Images and videos of a sample: sizes from headers, pixels when a step needs them."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

from tetrascope.engine.data.decode.cache import DecodeCache, cache_key
from tetrascope.engine.data.decode.images import Decoder, pick_decoder
from tetrascope.engine.data.sources.base import BadSample, Blob, MediaFile
from tetrascope.engine.data.store import Store, is_remote
from tetrascope.engine.data.video import BadVideo, VideoInfo, decode, probe
from tetrascope.errors import UserError
from tetrascope.models.family import MediaProcessor
from tetrascope.models.media import Media

BROKEN = (
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's plugins raise for files they cannot read, found by feeding them damaged ones or by reading them."""

BROKEN_VIDEO = (BadVideo, UserError, AttributeError, *BROKEN)
"""What damaged videos raise; PyAV a UnicodeDecodeError for names that are no text, an AttributeError where the codec is
unknown."""

SIGNATURES = {
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"<": "an XML file",
    b"%pdf": "a PDF",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x1ae\xdf\xa3": "a Matroska video",
    b"{": "JSON",
}
"""First bytes, in lower case, of what is often found under the name of an image."""

FRAMES = f"PyAV {av.__version__}"
"""What decodes video files, for the cache."""


class MediaReader:
    """Reads files for one family.

    patch: side of the encoder's patches in pixels. min_frames: frames that a video must have, if the user says so.
    pixel_limit: the largest image that is opened. decoder: of images, by default Pillow. cache: where decoded pictures
    and frames are kept, None for nowhere.
    """

    def __init__(
        self,
        processor: MediaProcessor,
        store: Store,
        patch: int,
        min_frames: int | None,
        pixel_limit: int,
        decoder: Decoder | None = None,
        cache: DecodeCache | None = None,
    ) -> None:
        self._processor, self._store = processor, store
        self._patch, self._min_frames, self._pixel_limit = patch, min_frames, pixel_limit
        self._decoder, self._cache = decoder or pick_decoder("pillow"), cache
        self._stamps: dict[str, str] = {}

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
            with self._store.open(file.blobs[0]) as stream:
                try:
                    info = probe(self._local(file.blobs[0]) or stream)
                except BROKEN_VIDEO as error:
                    raise _refused(file, file.blobs[0], stream, error) from error
            self._bound(file, file.blobs[0], (info.width, info.height))
        if file.kind == "video" and info.frames < (self._min_frames or 1):
            raise BadSample("other", f"{file} has {info.frames} frames, at least {self._min_frames} are needed")
        return info

    def _local(self, blob: Blob) -> Path | None:
        """The path of a blob that is a whole local file."""
        whole = not is_remote(blob.url) and blob.data is None and not blob.offset and blob.size is None
        return Path(blob.url) if whole else None

    def _size(self, file: MediaFile, blob: Blob) -> tuple[int, int]:
        with self._store.open(blob) as stream:
            return self._header(file, blob, stream)

    def _header(self, file: MediaFile, blob: Blob, stream: BinaryIO) -> tuple[int, int]:
        """Width and height of an image whose pixels may be decoded. Raises BadSample for one that may not."""
        try:
            with Image.open(stream) as image:
                size = image.size
        except BROKEN as error:
            raise _refused(file, blob, stream, error) from error
        except Image.DecompressionBombError as error:
            raise BadSample("image bomb", f"{file.kind} {blob}: {error}") from error
        self._bound(file, blob, size)
        return size

    def _bound(self, file: MediaFile, blob: Blob, size: tuple[int, int]) -> None:
        if size[0] * size[1] > self._pixel_limit:
            raise BadSample(
                "image bomb",
                f"{file.kind} {blob} has {size[0]}x{size[1]} pixels, more than "
                f"data.max_image_pixels={self._pixel_limit}; shrink it, raise the limit or remove the sample",
            )

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
        return self._frames(file, file.blobs[0], media.numbers)

    def _frames(self, file: MediaFile, blob: Blob, numbers: tuple[int, ...]) -> list[Image.Image]:
        """Frames of a video file; a number may repeat."""
        shown = sorted(set(numbers))
        key = self._key(blob, FRAMES, *shown)
        found = self._cached(key)
        if found is None:
            with self._store.open(blob) as stream:
                try:
                    found = decode(self._local(blob) or stream, shown)
                except BROKEN_VIDEO as error:
                    raise _refused(file, blob, stream, error) from error
            self._keep(key, found)
        return [found[shown.index(number)] for number in numbers]

    def _picture(self, file: MediaFile, blob: Blob) -> Image.Image:
        key = self._key(blob, self._decoder.mark)
        found = self._cached(key)
        if found is None:
            with self._store.open(blob) as stream:
                self._header(file, blob, stream)
                try:
                    found = [self._decoder.decode(stream)]
                except BROKEN as error:
                    raise _refused(file, blob, stream, error) from error
                except Image.DecompressionBombError as error:  # a format that holds further images, such as an icon
                    raise BadSample("image bomb", f"{file.kind} {blob}: {error}") from error
            self._keep(key, found)
        return found[0]

    def _key(self, blob: Blob, *decoded: object) -> str | None:
        """The cache's key for what is decoded of a blob; None when there is no cache or no such file.

        Remote files are asked for their stamp once: a run takes them for unchanged.
        """
        if self._cache is None:
            return None
        if blob.data is not None:
            return cache_key(hashlib.sha256(blob.data).hexdigest(), *decoded)
        try:
            stamp = self._stamps.get(blob.url) or self._store.stamp(blob.url)
        except UserError:
            return None
        if is_remote(blob.url):
            self._stamps[blob.url] = stamp
        return cache_key(blob.url, stamp, blob.offset, blob.size, *decoded)

    def _cached(self, key: str | None) -> list[Image.Image] | None:
        pixels = self._cache.get(key) if self._cache is not None and key is not None else None
        return None if pixels is None else [Image.fromarray(one) for one in pixels]

    def _keep(self, key: str | None, pictures: list[Image.Image]) -> None:
        if self._cache is not None and key is not None and pictures:
            self._cache.put(key, np.stack([np.asarray(one) for one in pictures]))


def _refused(file: MediaFile, blob: Blob, stream: BinaryIO, error: Exception) -> BadSample:
    """Why a file cannot be read: empty, something else under a wrong name, or damaged."""
    try:
        stream.seek(0)
        head = stream.read(64)
    except (OSError, ValueError):
        head = b"?"
    if not head:
        return BadSample("empty file", f"{file.kind} {blob} is empty; replace it or remove the sample")
    head = head.lstrip().lower()
    found = next((what for signature, what in SIGNATURES.items() if head.startswith(signature)), None)
    found = "an MP4 video" if head[4:8] == b"ftyp" else found
    if found and not (file.kind == "video" and found.endswith("video")):
        return BadSample("wrong type", f"{file.kind} {blob} is {found}; replace it or remove the sample")
    one_file = file.kind == "video" and len(file.blobs) == 1
    kind = "broken video" if one_file else "not an image"
    return BadSample(kind, f"{file.kind} {blob} is not readable ({error}); replace it or remove the sample")
