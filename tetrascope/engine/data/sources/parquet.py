"""Parquet files: a column `messages` or `conversations`, and columns of images and videos."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tetrascope.engine.data.sources.base import BadSample, Record
from tetrascope.engine.data.sources.conversation import record
from tetrascope.engine.data.sources.shards import RangeFile, expand, stamp
from tetrascope.engine.data.store import FILE, Store, is_remote
from tetrascope.errors import UserError

TEXT = ("messages", "conversations")
COLUMNS = ("id", *TEXT, "image", "images", "video", "videos")
"""The columns that are read; a file may have others."""


class ParquetRows:
    """Rows by number, of one file, a folder of .parquet files or a pattern.

    `messages` and `conversations` are lists of structs or JSON text; `image`, `images`, `video` and `videos` hold
    {bytes, path}, bytes or paths, alone or in lists. A row group is read as a whole, only in those columns, and the
    last ones are kept: reading in the order of the file costs one read a group, reading at random up to one a row.
    `blocks` says which rows share a group. Remote files are read in ranges.

    cache_mb: memory for row groups, in MiB; the group in use is kept even when it is larger.
    Raises UserError for files that cannot be read, are no Parquet or have no column of messages.
    """

    def __init__(self, path: str, store: Store, cache_mb: int = 256) -> None:
        self._store, self._cache_mb = store, cache_mb
        self._urls = expand(path, store, ".parquet")
        with ThreadPoolExecutor(min(8, len(self._urls))) as pool:
            opened = list(pool.map(self._metadata, self._urls))
        self._files: list[pq.FileMetaData] = [metadata for metadata, _ in opened]
        self._sizes = [size for _, size in opened]
        groups = [
            (number, group, metadata.row_group(group).num_rows)
            for number, metadata in enumerate(self._files)
            for group in range(metadata.num_row_groups)
        ]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise UserError(f"data: {path} holds no samples")
        self._open()

    def _open(self) -> None:
        self._cache = _Recent(self._cache_mb * 2**20)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def blocks(self) -> list[range]:
        """Rows that are read together: those of a row group, in order, covering all rows."""
        return [
            range(int(end - rows), int(end)) for end, rows in zip(self._ends, self._groups[:, 2], strict=True) if rows
        ]

    def stamp(self) -> str:
        return stamp(self._urls, self._store)

    def record(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        group = int(np.searchsorted(self._ends, number, side="right"))
        file, inner, rows = (int(x) for x in self._groups[group])
        table = self._cache.get((file, inner), lambda: self._read(file, inner))
        row = table.slice(number - int(self._ends[group]) + rows, 1).to_pylist()[0]
        place = f"row {number + 1}"
        try:
            for key in TEXT:
                row[key] = _without_none(_parsed(row.get(key), place))
            return record(row, place, self._store.resolve)
        except BadSample as error:
            raise BadSample(error.kind, f"{self._urls[file]}: {error}") from error

    def _read(self, file: int, group: int) -> pa.Table:
        url, metadata = self._urls[file], self._files[file]
        columns = [name for name in metadata.schema.to_arrow_schema().names if name in COLUMNS]
        try:
            with _opened(url, self._store, self._sizes[file], metadata) as opened:
                return opened.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError, UserError) as error:
            raise BadSample("other", f"{url}: row group {group} cannot be read ({error})") from error

    def _metadata(self, url: str) -> tuple[pq.FileMetaData, int]:
        size = self._store.size(url)
        try:
            with _opened(url, self._store, size) as opened:
                names = opened.schema_arrow.names
                metadata = opened.metadata
        except (pa.ArrowException, OSError, BadSample) as error:
            raise UserError(f"data: {url} is not readable as Parquet ({error}); check the file") from error
        if not set(TEXT) & set(names):
            raise UserError(f"data: {url} has no column messages or conversations, only {', '.join(names)}; rename one")
        return metadata, size


def _opened(url: str, store: Store, size: int, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A file of its own for the calling thread; `metadata` spares reading them again."""
    if is_remote(url):
        return pq.ParquetFile(RangeFile(url, store, size), metadata=metadata, pre_buffer=True)
    return pq.ParquetFile(url.removeprefix(FILE), metadata=metadata)


def _parsed(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad json", f"{place}: not valid JSON ({error})") from error


def _without_none(value: Any) -> Any:
    """Without the keys that Arrow gives every struct of a column because another row's has them."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


class _Recent:
    """Row groups read last, up to so many bytes. Threads that want the same one wait for the first of them."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Future[pa.Table]] = OrderedDict()

    def get(self, key: tuple[int, int], read: Callable[[], pa.Table]) -> pa.Table:
        with self._lock:
            found = self._kept.get(key)
            first = found is None
            found = self._kept.setdefault(key, Future())
            self._kept.move_to_end(key)
        if not first:
            return found.result()
        try:
            found.set_result(read())
        except BaseException as error:
            found.set_exception(error)
            with self._lock:
                del self._kept[key]
            raise
        with self._lock:
            self._forget(key)
        return found.result()

    def _forget(self, newest: tuple[int, int]) -> None:
        read = {key: found.result().nbytes for key, found in self._kept.items() if found.done()}
        size = sum(read.values())
        for key in list(read):
            if size <= self._limit or key == newest:
                break
            size -= read[key]
            del self._kept[key]
