"""Sources of several files: which they are, whether they changed, and reading a part of one."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tetrascope.engine.data.sources.base import Blob
from tetrascope.engine.data.store import FILE, Store, is_remote
from tetrascope.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


def expand(path: str, store: Store, suffix: str) -> list[str]:
    """The files that a path means: itself, those of a folder with a suffix, a glob's, or a brace range's.

    `a-{000..012}.tar` and `a-{x,y}.tar` are in their written order, the others sorted. Raises UserError for none.
    """
    path = path.removeprefix(FILE)
    if not is_remote(path) and os.path.isfile(path):
        return [path]
    found = []
    for one in braces(path):
        if re.search(r"[*?\[]", one):
            found += store.list(one)
        elif _is_folder(one, store):
            found += store.list(f"{one.rstrip('/')}/*{suffix}")
        else:
            found.append(one)
    if not found:
        raise UserError(f"data: {path} holds no {suffix} files; give a file, a folder of them or a pattern")
    return found


def braces(path: str) -> list[str]:
    """Every path that a pattern with braces stands for; the digits of a range's first number are its width."""
    group = BRACES.search(path)
    if group is None:
        return [path]
    numbers = NUMBERS.fullmatch(group[1])
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise UserError(f"data: {path}: the range {group[0]} ends before it begins")
        choices = [f"{i:0{len(numbers[1])}d}" for i in range(first, last + 1)]
    else:
        choices = group[1].split(",")
    return [whole for one in choices for whole in braces(path[: group.start()] + one + path[group.end() :])]


def _is_folder(path: str, store: Store) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    if path.rpartition("/")[2].count("."):  # spares a request: files have a suffix
        return False
    filesystem, inside = store.filesystem(path)
    try:
        return bool(store.request(lambda: filesystem.isdir(inside)))
    except OSError as error:
        raise UserError(f"data: {path} cannot be read ({error}); check the address") from error


def stamp(urls: Sequence[str], store: Store) -> str:
    """Changes when one of the files does, or their order. Raises UserError for a file that there is not."""
    with ThreadPoolExecutor(store.options.concurrency) as pool:
        lines = [f"{url} {mark}" for url, mark in zip(urls, pool.map(store.stamp, urls), strict=True)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class RangeFile(io.RawIOBase):
    """A file of a store that is read in ranges, each a request of its own with the store's retries and bounds.

    size: of the file, when it is known already. Raises BadSample for a range that cannot be read.
    """

    def __init__(self, url: str, store: Store, size: int | None = None) -> None:
        super().__init__()
        self._url, self._store = url, store
        self.size, self._place = store.size(url) if size is None else size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._store.read(Blob(self._url, self._place, wanted)) if wanted else b""
        self._place += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io.BufferedReader asks for this one
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
