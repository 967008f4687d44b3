"""What a source of samples gives, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

BAD_KINDS = (
    "bad json",
    "missing file",
    "outside root",
    "not an image",
    "image bomb",
    "empty file",
    "wrong type",
    "truncated tar",
    "broken video",
    "too long",
    "nothing to learn",
    "changed",
    "other",
)
"""What can be wrong with a sample; runs count skipped samples by these words."""


def plain(text: str) -> str:
    """Text that can be written as UTF-8: names of files and samples may hold bytes or half characters that cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class BadSample(Exception):
    """A sample that cannot be used. kind: one of BAD_KINDS; the message names file, place and what is wrong."""

    def __init__(self, kind: str, message: str) -> None:
        if kind not in BAD_KINDS:
            raise ValueError(f"unknown kind {kind!r}")
        super().__init__(plain(message))
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.kind, str(self))  # exceptions come back from worker processes pickled


@dataclass(frozen=True)
class Blob:
    """Where the bytes of a file lie: a file at `url` (a path or an fsspec URL), a range of it, or here in `data`.

    size: bytes from `offset`, None for all that follow. With `data`, the url only names the place.
    """

    url: str
    offset: int = 0
    size: int | None = None
    data: bytes | None = None

    def __str__(self) -> str:
        return self.url if not self.offset and self.size is None else f"{self.url} at byte {self.offset}"


@dataclass(frozen=True)
class MediaFile:
    """An image, or a video: one file, or the pictures that are its frames, shown `fps` times a second."""

    kind: Literal["image", "video"]
    blobs: tuple[Blob, ...]
    fps: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind} {self.blobs[0]}"


@dataclass(frozen=True)
class Record:
    """A sample as its source holds it.

    messages: {"role", "content"} with content a string or a list of parts; files: its images and videos, in the order
    of the parts that stand for them. tokens: int64 `[T]` instead of messages, for text that is tokenized already.
    """

    name: str
    messages: list[dict[str, Any]] | None
    files: tuple[MediaFile, ...] = ()
    tokens: np.ndarray | None = None


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def record(self, number: int) -> Record:
        """The sample of that number. Raises BadSample when it cannot be read."""

    def stamp(self) -> str:
        """Changes when the content does; cheap: sizes and times of files, not their bytes."""
