"""Reading bytes: local paths and any fsspec URL, with retries, bounded concurrency and a limit of requests a second."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from tetrascope.engine.data.sources.base import BadSample, Blob
from tetrascope.errors import UserError

T = TypeVar("T")
FILE = "file://"
FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UserError)
"""What is raised for a request that fails however often it is made.

Everything else may pass: the file systems' own errors (aiohttp's, gcsfs') have no common base but Exception.
"""


@dataclass(frozen=True)
class StoreOptions:
    """retries: further attempts of a failed remote request. concurrency: requests at once in this process.
    requests_per_second: None for no limit. cache_dir: where remote files that must be local are kept."""

    retries: int = 4
    concurrency: int = 16
    requests_per_second: float | None = None
    cache_dir: Path | None = None


class Store:
    """Reads files for a source.

    root: the folder that local paths may not leave, None for no such bound (URLs are then not bounded either).
    Relative paths are taken from it.
    """

    def __init__(self, root: str | None = None, options: StoreOptions | None = None) -> None:
        self.options = options or StoreOptions()
        self.root = root
        self._requests = threading.Semaphore(self.options.concurrency)
        self._lock = threading.Lock()
        self._next_request = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], state["options"])  # type: ignore[misc]

    def resolve(self, path: str) -> str:
        """A path that a sample names, as absolute path or URL.

        Raises BadSample ("outside root") when it leads out of the root, by `..`, by a link or by being another place.
        """
        path = path.removeprefix(FILE)
        if self.root is None:
            return path
        if is_remote(self.root):
            joined = path if is_remote(path) else f"{self.root.rstrip('/')}/{path.lstrip('/')}"
            inside = joined.startswith(self.root.rstrip("/") + "/") and ".." not in unquote(joined).split("/")
            inside = inside and "::" not in joined[len(self.root) :]  # fsspec's chains lead elsewhere
        else:
            joined = os.path.join(self.root.removeprefix(FILE), path)
            root = os.path.realpath(self.root.removeprefix(FILE))
            try:
                inside = not is_remote(path) and os.path.commonpath([os.path.realpath(joined), root]) == root
            except ValueError as error:  # a null byte, half of a surrogate pair
                raise BadSample("missing file", f"{path!r} is no path ({error}); fix the sample") from error
        if not inside:
            raise BadSample("outside root", f"{path} leads out of {self.root}; move it there or set the source's root")
        return joined

    def open(self, blob: Blob) -> BinaryIO:
        """The blob's bytes as a seekable file. Raises BadSample when there are none."""
        try:
            if blob.data is None and not is_remote(blob.url):
                file: BinaryIO = open(blob.url.removeprefix(FILE), "rb")  # noqa: SIM115 the caller closes it
                if os.fstat(file.fileno()).st_size > 0 and blob.size != 0:
                    return file if not blob.offset and blob.size is None else _Range(file, blob)
                file.close()
                data = b""
            else:
                data = self.request(lambda: self._fetch(blob)) if blob.data is None else blob.data
        except FileNotFoundError as error:
            raise BadSample("missing file", f"{blob.url} does not exist; fix the path or remove the sample") from error
        except (OSError, ValueError) as error:
            raise BadSample("missing file", f"{blob.url} cannot be read: {error}") from error
        if not data:
            raise BadSample("empty file", f"{blob} is empty; replace it or remove the sample")
        return io.BytesIO(data)

    def read(self, blob: Blob) -> bytes:
        """All bytes of a blob."""
        with self.open(blob) as file:
            return file.read()

    def local(self, url: str) -> Path:
        """A local path with the content of `url`: itself, or a copy kept in the cache folder.

        Raises UserError when it cannot be read.
        """
        if not is_remote(url):
            return Path(url.removeprefix(FILE))
        folder = self.options.cache_dir or Path.home() / ".cache" / "tetrascope"
        key = hashlib.sha256(f"{url}\n{self.stamp(url)}".encode()).hexdigest()[:32]
        target = folder / f"{key}{Path(url).suffix}"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
            filesystem, path = self.filesystem(url)
            try:
                self.request(lambda: filesystem.get_file(path, str(partial)))
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise UserError(f"{url}: cannot be read ({error}); check the address and the credentials") from error
            partial.replace(target)
        return target

    def stamp(self, url: str) -> str:
        """Size and time of change, or what the object store has instead. Raises UserError for a file there is not."""
        try:
            if not is_remote(url):
                stat = os.stat(url.removeprefix(FILE))
                return f"{stat.st_size}-{stat.st_mtime_ns}"
            info = self._info(url)
        except OSError as error:
            raise UserError(f"{url}: cannot be read ({error}); check the address") from error
        keys = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
        return "-".join(str(info[key]) for key in keys if info.get(key) is not None)

    def size(self, url: str) -> int:
        """Bytes of a file. Raises UserError for one that there is not."""
        try:
            size = self._info(url)["size"] if is_remote(url) else os.path.getsize(url.removeprefix(FILE))
        except OSError as error:
            raise UserError(f"{url}: cannot be read ({error}); check the path") from error
        if size is None:
            raise UserError(f"{url}: the server does not say how long it is; copy it to a local folder")
        return int(size)

    def list(self, pattern: str) -> list[str]:
        """Files that match a glob pattern, sorted. Raises UserError when the place cannot be listed."""
        filesystem, path = self.filesystem(pattern)
        try:
            found = sorted(str(name) for name in self.request(lambda: filesystem.glob(path)))
        except OSError as error:
            raise UserError(f"{pattern}: cannot be listed ({error}); check the address") from error
        return [str(filesystem.unstrip_protocol(name)) if is_remote(pattern) else name for name in found]

    def filesystem(self, url: str) -> tuple[Any, str]:
        """fsspec's file system of a URL and the path in it. Raises UserError when it is not installed."""
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error}; install fsspec's package for it or fix the address") from error
        return filesystem, str(path)

    def request(self, call: Callable[[], T]) -> T:
        """What `call` gives, made again while it fails, within the bounds of the options.

        Raises OSError, whatever the file system's own error is.
        """
        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, FINAL)),
            stop=stop_after_attempt(self.options.retries + 1),
            wait=wait_exponential(multiplier=0.2, max=20) + wait_random(0, 1),  # spread: ranks fail together
            reraise=True,
        )
        try:
            for attempt in attempts:
                with attempt, self._requests:
                    self._wait_for_turn()
                    return call()
        except (OSError, UserError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        raise AssertionError("tenacity ends with a result or an exception")

    def _info(self, url: str) -> Any:
        filesystem, path = self.filesystem(url)
        return self.request(lambda: filesystem.info(path))

    def _fetch(self, blob: Blob) -> bytes:
        filesystem, path = self.filesystem(blob.url)
        end = None if blob.size is None else blob.offset + blob.size
        data: bytes = filesystem.cat_file(path, start=blob.offset or None, end=end)
        if blob.size is not None and len(data) > blob.size:
            raise OSError(f"the server gave {len(data)} bytes of {blob.size}: it cannot serve ranges")
        return data

    def _wait_for_turn(self) -> None:
        rate = self.options.requests_per_second
        if rate is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next_request)
            self._next_request = turn + 1 / rate
        time.sleep(turn - now)


def is_remote(path: str) -> bool:
    """Whether a path is a URL of another file system."""
    return "://" in path and not path.startswith(FILE)


class _Range(io.RawIOBase, BinaryIO):
    """A byte range of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, blob: Blob) -> None:
        super().__init__()
        self._file, self._start = file, blob.offset
        end = os.fstat(file.fileno()).st_size
        self._size = end - blob.offset if blob.size is None else blob.size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._place)
        data = self._file.read(wanted)
        self._place += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def close(self) -> None:
        self._file.close()
        super().close()
