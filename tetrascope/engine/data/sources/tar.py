"""Where the members of a tar file lie, from its headers alone.

Header layout: POSIX.1-1988 ustar and POSIX.1-2001 pax (IEEE Std 1003.1, "pax Interchange Format"), and GNU's long
names and binary sizes (GNU tar manual, "Basic Tar Format"). Names are data here: nothing is unpacked, no name is ever
joined with a path.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tetrascope.engine.data.sources.base import BadSample
from tetrascope.engine.data.sources.shards import RangeFile
from tetrascope.engine.data.store import FILE, Store, is_remote
from tetrascope.errors import UserError

BLOCK = 512
READ_AHEAD = 1 << 17
"""Bytes of a remote file that are read at once: many headers when members are small, one when they are large."""

LONGEST_NAME = 1 << 20
"""Bytes of an extended header that are read; a larger one is damage."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file: its bytes are `size` from `offset`."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Contents:
    """Whole members of a tar file. damage: what ends it early, None for a whole file. cut: name of the member that
    was cut, None when not known."""

    members: list[Member]
    damage: BadSample | None = None
    cut: str | None = None


def read_contents(url: str, store: Store) -> Contents:
    """Reads the headers of a tar file. Raises UserError for one that cannot be opened or is compressed."""
    try:
        if is_remote(url):
            stream: BinaryIO = io.BufferedReader(RangeFile(url, store), READ_AHEAD)  # type: ignore[assignment]
        else:
            stream = open(url.removeprefix(FILE), "rb")  # noqa: SIM115 closed below
        with stream:
            return _scan(url, stream, stream.seek(0, os.SEEK_END))
    except OSError as error:
        raise UserError(f"data: {url} cannot be read ({error.strerror or error}); check the path") from error
    except BadSample as error:
        raise UserError(f"data: {error}") from error


@dataclass
class _Cut(Exception):
    why: str
    name: str | None = None


def _scan(url: str, stream: BinaryIO, end: int) -> Contents:
    stream.seek(0)
    head = stream.read(8)
    for signature, name in COMPRESSED.items():
        if head.startswith(signature):
            raise UserError(
                f"data: {url} is compressed with {name}, so that no member can be read without all before it; "
                "decompress the shards (gunzip) and name the .tar files"
            )
    members: list[Member] = []
    try:
        for member in _members(stream, end):
            members.append(member)
    except _Cut as cut:
        if not end:
            return Contents([], BadSample("empty file", f"{url} is empty"))
        return Contents(members, BadSample("truncated tar", f"{url}: {cut.why}"), cut.name)
    return Contents(members)


def _members(stream: BinaryIO, end: int) -> Iterator[Member]:
    """Regular files up to the end marker, a block of zeros. Raises _Cut when something else comes first."""
    place, name, size = 0, None, None  # name and size: from an extended header that precedes the member
    while True:
        stream.seek(place)
        header = stream.read(BLOCK)
        if not header:
            raise _Cut(f"ends at byte {place} without an end marker; members that followed are lost")
        if len(header) < BLOCK:
            raise _Cut(f"the header at byte {place} is cut", name)
        if not any(header):
            return
        if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise _Cut(f"at byte {place} is no tar header")
        kind = header[156:157]
        length = _number(header[124:136]) if size is None or kind in b"xgLK" else size
        place += BLOCK
        if length < 0 or length > end - place:
            shown = name or _name(header)
            raise _Cut(f"member {shown} at byte {place} has {max(0, end - place)} bytes of {length}", shown)
        if kind in (b"x", b"L"):
            if length > LONGEST_NAME:
                raise _Cut(f"the extended header at byte {place} has {length} bytes")
            data = stream.read(length)
            if kind == b"L":
                name = _text(data.rstrip(b"\0"))
            else:
                name, size = _pax(data, name, size)
        else:  # others than regular files: folders, links, pax defaults; nothing that is used here
            if kind in (b"0", b"\0", b"7"):
                yield Member(name or _name(header), place, length)
            name, size = None, None
        place += -(-length // BLOCK) * BLOCK


def _pax(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Path and size of a pax header: records `<length> <key>=<value>\\n`, length in decimal and of the whole record."""
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise _Cut("a pax header is not readable")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit():
            size = int(value)
        data = data[int(length) :]
    return name, size


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    ustar = header[257:263] == b"ustar\0"  # GNU's own format keeps times where ustar has the prefix
    return _text(prefix + b"/" + name if prefix and ustar else name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """A size: octal digits, or GNU's big-endian binary with the first bit set. Negative: not readable."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return -1
