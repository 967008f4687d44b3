"""Decoded pictures and frames kept on disk, so that an epoch after the first need not decode again.

Many processes share a cache. A file holds what one key stands for; it appears whole or not at all, and one that is
damaged counts as not there. What was used longest ago is removed when the bound is reached. The total is kept in a
file that is changed under a lock only, so the bound holds for all processes together (besides it, each process may
have one unfinished file).

Not diskcache: it is built on SQLite, which network file systems break (its own caveats), it unpickles what it finds,
and it has had no release since 2023.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tetrascope.errors import UserError

HEADER = struct.Struct("<8sIIIIQ")
"""MAGIC, frames, height, width, CRC-32 of the pixels, their number of bytes."""
MAGIC = b"TSFRAMES"
SUFFIX, PARTIAL = ".frames", ".partial"
ABANDONED = 3600.0
"""Seconds after which an unfinished file is taken for one whose process died."""
LOW_WATER = 0.9
"""Share of the bound that is left after removing: folders are then looked through seldom."""


def cache_key(*parts: object) -> str:
    """A hash of everything the pixels depend on: where they come from, which ones, who decoded them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class DecodeCache:
    """A folder of uint8 arrays `[frames, height, width, 3]` by key, `size` bytes at most. Can be sent to workers.

    Raises UserError when the folder cannot be made, written or locked. Once it is open, a failing disk costs time, not
    the run: what cannot be read or written is decoded anew.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._reserved(0):
                pass
        except OSError as error:
            raise UserError(
                f"data.decode_cache.dir: {folder} cannot be used ({error}); name a folder on a local disk"
            ) from error

    def get(self, key: str) -> np.ndarray | None:
        """The array kept under a key, read-only; None when there is none. Damaged files are removed."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        pixels = _unpack(data)
        with contextlib.suppress(OSError):  # another process may have removed it
            if pixels is None:
                path.unlink()
            else:
                os.utime(path)
        return pixels

    def put(self, key: str, pixels: np.ndarray) -> None:
        """Keeps an array; not one that is larger than the whole cache."""
        data = np.ascontiguousarray(pixels)
        header = HEADER.pack(MAGIC, *data.shape[:3], zlib.crc32(data.data), data.nbytes)
        length = len(header) + data.nbytes
        if length > self.size:
            return
        path = self._path(key)
        partial = path.with_name(f"{uuid.uuid4().hex}{PARTIAL}")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(partial, "wb") as file:
                file.write(header)
                file.write(data.data)
            with self._reserved(length):
                partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _evict(self, needed: int) -> int:
        """Removes the files used longest ago until `needed` bytes fit; the bytes of those that are left."""
        files = []
        for entry in _files(self.folder):
            with contextlib.suppress(OSError):
                stat = entry.stat()
                if entry.name.endswith(SUFFIX):
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif entry.name.endswith(PARTIAL) and time.time() - stat.st_mtime > ABANDONED:
                    os.unlink(entry.path)
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left + needed <= self.size * LOW_WATER:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            left -= size
        return left

    @contextlib.contextmanager
    def _reserved(self, needed: int) -> Iterator[None]:
        """Holds the lock, with room for `needed` more bytes that count from now on.

        The number is never too small: it grows before the file appears, and files that go by themselves stay in it
        until the next count. A damaged one is counted anew.
        """
        with open(self.folder / "total", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            total = int(text) if text.isdigit() else self._evict(needed)
            total = self._evict(needed) if total + needed > self.size else total
            file.truncate(0)
            file.write(b"%d" % (total + needed))
            file.flush()
            yield


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    for inside in os.scandir(folder):
        if inside.is_dir():
            yield from os.scandir(inside)


def _unpack(data: bytes) -> np.ndarray | None:
    if len(data) < HEADER.size:
        return None
    magic, frames, height, width, crc, length = HEADER.unpack_from(data)
    body = memoryview(data)[HEADER.size :]
    whole = magic == MAGIC and len(body) == length == frames * height * width * 3 and zlib.crc32(body) == crc
    return np.frombuffer(body, np.uint8).reshape(frames, height, width, 3) if whole else None
