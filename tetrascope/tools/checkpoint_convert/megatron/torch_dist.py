"""Folders that torch.distributed.checkpoint wrote, read and written a piece of a tensor at a time.

Plain files, no process group and no Megatron-Core: `.metadata` lists the tensors, and of each the rectangles that it
was saved in (its chunks), every one a `torch.save` file of its own somewhere inside a `.distcp` file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tetrascope.errors import UserError
from tetrascope.models.weights import HFTensor
from tetrascope.tools.checkpoint_convert.megatron.safe_pickle import load_contents

CACHE_BYTES = 256 * 2**20
"""Of chunks that are kept in case that more of them is asked for."""

Box = tuple[slice, ...]
"""A rectangle of a tensor: a slice with start and stop along each dimension."""


def boxes(tensor: HFTensor, start: int, rows: int) -> Iterator[Box]:
    """The rows [start, start + rows) of a tensor's matrix as rectangles of the tensor itself, in order.

    Rows may count several leading dimensions, such as layers and the rows of each.
    """
    leading = next(k for k in range(1, len(tensor.shape) + 1) if math.prod(tensor.shape[:k]) == tensor.matrix[0])
    if math.prod(tensor.shape[leading:]) != math.prod(tensor.matrix[1:]):
        raise ValueError(f"{tensor.name}: rows of the view {tensor.view} are none of the shape {tensor.shape}")
    rest = tuple(slice(0, n) for n in tensor.shape[leading:])
    for box in _row_boxes(tensor.shape[:leading], start, rows):
        yield (*box, *rest)


def _row_boxes(shape: Sequence[int], start: int, rows: int) -> Iterator[Box]:
    if len(shape) == 1:
        yield (slice(start, start + rows),)
        return
    inner = math.prod(shape[1:])
    for i in range(start // inner, -(-(start + rows) // inner)):
        low, high = max(start, i * inner), min(start + rows, (i + 1) * inner)
        for box in _row_boxes(shape[1:], low - i * inner, high - low):
            yield (slice(i, i + 1), *box)


class DcpFolder:
    """Reads tensors of such a folder, from several threads. Chunks read last are kept, CACHE_BYTES of them at most, or
    one that is larger.

    Raises UserError when the folder's list of contents is missing, damaged or not only data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        contents = load_contents(folder / ".metadata")
        self._storage: dict[MetadataIndex, Any] = contents.storage_data or {}
        self._tensors = {
            name: entry
            for name, entry in contents.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._cache: dict[MetadataIndex, Tensor] = {}
        self._lock = threading.Lock()

    def names(self) -> Iterable[str]:
        """The tensors' names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a tensor as saved."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor as saved."""
        return self._tensors[name].properties.dtype

    def read(self, tensor: HFTensor, start: int, rows: int) -> Tensor:
        """The rows [start, start + rows) of a tensor's matrix. What is saved may have more rows than the tensor.

        Raises UserError when a file is missing or damaged, or none has these numbers.
        """
        parts = [self._read_box(tensor.name, box) for box in boxes(tensor, start, rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(rows, *tensor.matrix[1:])

    def _read_box(self, name: str, box: Box) -> Tensor:
        """`box`, its leading dimensions of one element kept."""
        entry = self._tensors[name]
        out: Tensor | None = None
        wanted, filled = math.prod(s.stop - s.start for s in box), 0
        for number, chunk in enumerate(entry.chunks):
            common = [
                slice(max(s.start, offset), min(s.stop, offset + size))
                for s, offset, size in zip(box, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(s.start >= s.stop for s in common):
                continue
            whole = self._chunk(MetadataIndex(name, chunk.offsets, number), chunk.sizes)
            piece = whole[tuple(slice(s.start - o, s.stop - o) for s, o in zip(common, chunk.offsets, strict=True))]
            if piece.numel() == wanted:
                return piece.clone()
            if out is None:
                out = torch.empty([s.stop - s.start for s in box], dtype=piece.dtype)
            out[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(common, box, strict=True))] = piece
            filled += piece.numel()
        if out is None or filled != wanted:
            raise UserError(f"{self.folder}: no file holds all of {name}; the checkpoint is incomplete, copy it again")
        return out

    def _chunk(self, index: MetadataIndex, sizes: Sequence[int]) -> Tensor:
        """A chunk: q, k and v come from the same one, as do neighbouring rows."""
        with self._lock:
            found = self._cache.pop(index, None)
            if found is None:
                room = CACHE_BYTES - math.prod(sizes) * self.dtype(index.fqn).itemsize
                while self._cache and sum(tensor.nbytes for tensor in self._cache.values()) > room:
                    del self._cache[next(iter(self._cache))]
                found = self._load(index, sizes)
            self._cache[index] = found  # at the end: the first one is the one that was used longest ago
            return found

    def _load(self, index: MetadataIndex, sizes: Sequence[int]) -> Tensor:
        info = self._storage.get(index)
        if info is None:
            raise UserError(f"{self.folder / '.metadata'}: does not say where {index.fqn} lies; copy it again")
        path = self.folder / info.relative_path
        if PurePosixPath(info.relative_path).name != info.relative_path:
            raise UserError(f"{self.folder / '.metadata'}: names the file {info.relative_path!r}, outside the folder")
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{path}: is compressed ({info.transform_descriptors}); save the checkpoint without")
        if not path.is_file():
            raise UserError(f"{path}: no such file, which .metadata names for {index.fqn}; copy the checkpoint again")
        try:
            with path.open("rb", buffering=0) as file:
                found = torch.load(io.BufferedReader(_Window(file, info.offset, info.length)), weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: damaged at {index.fqn} ({cause}); copy the checkpoint again") from error
        if not isinstance(found, Tensor) or tuple(found.shape) != tuple(sizes):
            raise UserError(f"{path}: holds something else than {index.fqn}; copy the checkpoint again")
        return found.detach()


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, read as it is asked for."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


class DcpFile:
    """Writes one `.distcp` file, a chunk at a time. `close` returns what `write_contents` must know of it."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("wb")
        self._records: list[dict[str, Any]] = []

    def add(self, name: str, shape: Sequence[int], offset: Sequence[int], chunk: Tensor) -> None:
        """A rectangle of the tensor `name`, whose whole shape is `shape`, that begins at `offset`."""
        chunk = chunk.detach().cpu().contiguous()
        if chunk.untyped_storage().nbytes() != chunk.nbytes:
            chunk = chunk.clone()  # torch.save writes the whole storage of a view
        record = {"shape": list(shape), "offset": list(offset), "sizes": list(chunk.shape)}
        self._save(name, chunk, record | {"dtype": str(chunk.dtype).removeprefix("torch.")})

    def add_object(self, name: str, value: Any) -> None:
        """A value that is no tensor."""
        self._save(name, value, {})

    def _save(self, name: str, value: Any, record: dict[str, Any]) -> None:
        start = self._file.tell()
        # Without the archives' own checksums, which torch.load does not look at.
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(value, cast(IO[bytes], _Appending(self._file)))
        finally:
            torch.serialization.set_crc32_options(before)
        length = self._file.tell() - start
        self._records.append({"name": name, "file": self._name, "start": start, "length": length, **record})

    def close(self) -> list[dict[str, Any]]:
        """Syncs the file to disk; returns JSON values."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._records


class _Appending(io.RawIOBase):
    """A file to be written at the end of another. torch.save, given a real file, would look for its name and place."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)


def write_contents(folder: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes `.metadata`, without which a folder is no checkpoint, from the records of its files."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        name = record["name"]
        if "shape" in record:
            properties = TensorProperties(getattr(torch, record["dtype"]))
            entry = entries.setdefault(name, TensorStorageMetadata(properties, torch.Size(record["shape"]), []))
            offset, sizes = torch.Size(record["offset"]), torch.Size(record["sizes"])
            index = MetadataIndex(name, offset, len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(offset, sizes))
        else:
            entries[name] = BytesStorageMetadata()
            index = MetadataIndex(name)
        storage[index] = _StorageInfo(record["file"], record["start"], record["length"])
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(Metadata(entries, planner_data={}, storage_data=storage, version=CURRENT_DCP_VERSION), file)
        file.flush()
        os.fsync(file.fileno())
