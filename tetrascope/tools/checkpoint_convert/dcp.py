"""Tensors in a torch.distributed.checkpoint folder, read by row ranges and written one at a time.

Its files are sequences of what torch.save writes: zip archives that hold a tensor's bytes uncompressed. Reading finds
these bytes and reads the rows asked for, at their offsets; torch's own reader would load whole shards.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from tetrascope.engine.checkpoint import CheckpointReader, FileRecord, ShardWriter
from tetrascope.engine.checkpoint.files import ChecksumStream
from tetrascope.engine.checkpoint.shards import ShardSavePlanner
from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.tools.checkpoint_convert.formats import Output, Rows
from tetrascope.tools.checkpoint_convert.safetensors_file import read_into


class _FilePart(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._offset + self._at)
        self._at += count
        return count


class DcpFolder:
    """The tensors of a torch.distributed.checkpoint folder; safe to read from in several threads.

    Reads the list of contents and looks at the files' sizes. Raises UserError when the list is damaged or holds
    anything foreign, when a file is missing or too short, and when shards do not make up their tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            metadata = CheckpointReader(folder).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged(f".metadata: {error!r}") from error
        self._storage: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._files: dict[str, io.FileIO] = {}
        self._places: dict[MetadataIndex, int] = {}
        self._lock = threading.Lock()
        for name in self.tensors:
            self._check(name)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder}: damaged ({what}); convert another checkpoint")

    def _check(self, name: str) -> None:
        entry, held = self.tensors[name], 0
        for chunk in entry.chunks:
            info = self._storage.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                raise self._damaged(f".metadata does not say where the part of {name} at {tuple(chunk.offsets)} is")
            size = os.fstat(self._open(info.relative_path).fileno()).st_size
            if info.offset + info.length > size:
                raise self._damaged(f"{info.relative_path} has {size} bytes, {info.offset + info.length} were written")
            held += chunk.sizes.numel()
        if held != entry.size.numel():
            raise self._damaged(f"the parts of {name} have {held} numbers, it has {entry.size.numel()}")

    def _open(self, relative: str) -> io.FileIO:
        if relative not in self._files:
            try:
                self._files[relative] = (self.folder / relative).open("rb", buffering=0)
            except OSError as error:
                raise self._damaged(f"{relative}: {error.strerror}") from error
        return self._files[relative]

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return self.tensors[name].properties.dtype

    def read(self, name: str, start: int, rows: int) -> Tensor:
        """Rows [start, start + rows) of a matrix or vector. Raises UserError when they cannot be read."""
        entry = self.tensors[name]
        found = torch.empty((rows, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            first = chunk.offsets[0]
            low, high = max(start, first), min(start + rows, first + chunk.sizes[0])
            if low < high:
                part = self._read_rows(name, chunk, low - first, high - low)
                columns = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                place = (slice(low - start, high - start), *columns)
                found[place] = part
        return found

    def _read_rows(self, name: str, chunk: ChunkStorageMetadata, start: int, rows: int) -> Tensor:
        index, dtype = MetadataIndex(name, chunk.offsets), self.dtype(name)
        info = self._storage[index]
        file = self._open(info.relative_path)
        with self._lock:
            if index not in self._places:
                self._places[index] = self._find(name, chunk, info, file.fileno())
        row = chunk.sizes[1:].numel() * dtype.itemsize
        part = torch.empty((rows, *chunk.sizes[1:]), dtype=dtype)
        return read_into(file.fileno(), part, self._places[index] + start * row, self.folder / info.relative_path)

    def _find(self, name: str, chunk: ChunkStorageMetadata, info: _StorageInfo, descriptor: int) -> int:
        """Where a shard's bytes begin in its file."""
        try:
            part = io.BufferedReader(_FilePart(descriptor, info.offset, info.length))
            shape: Any = torch.load(part, map_location="meta", weights_only=True)
            if shape.shape != chunk.sizes or shape.dtype != self.dtype(name):
                raise self._damaged(f"{info.relative_path}: {name} has {tuple(shape.shape)} numbers of {shape.dtype}")
            with zipfile.ZipFile(part) as archive:
                entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
            plain = shape.is_contiguous() and shape.storage_offset() == 0 and entry.compress_type == zipfile.ZIP_STORED
            if not plain or entry.file_size != shape.nbytes:
                raise self._damaged(f"{info.relative_path}: {name} is not stored row by row")
            part.seek(entry.header_offset + 26)  # lengths of name and extra field, before the bytes
            lengths = part.read(4)
        except (OSError, RuntimeError, EOFError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise self._damaged(f"{info.relative_path}: {error!r}") from error
        skipped = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return int(info.offset + entry.header_offset + skipped)


@contextmanager
def _no_zip_checksums() -> Iterator[None]:
    """Without the checksums in torch.save's archives, which torch.load does not look at and which take longer than all
    the rest; the files have checksums of their own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_dcp_file(output: Output, folder: Path, rows: Rows) -> dict[str, Any]:
    """Writes one file of a torch.distributed.checkpoint folder, one whole target after the other.

    Returns its size, its checksum, and the offset and length of each target, for `dcp_metadata`.
    """
    places = []
    with _no_zip_checksums(), ChecksumStream(folder / output.path) as stream:
        for target in output.targets:
            begin = stream.tell()
            torch.save(rows.whole(target), cast(IO[bytes], stream))
            places.append([begin, stream.tell() - begin])
    return {"bytes": stream.record.bytes, "crc32": stream.record.crc32, "places": places}


def write_dcp_metadata(
    folder: Path, outputs: Mapping[str, list[Shard]], records: Mapping[str, dict[str, Any]]
) -> dict[str, FileRecord]:
    """Writes `.metadata`, the list of contents. Returns the records of all files, this one included.

    outputs: file -> the shards in it, in order, as tensors of the meta device in the dtype written. Raises ValueError
    when the shards do not make up their tensors.
    """
    plans = [ShardSavePlanner(shards).create_local_plan() for shards in outputs.values()]
    planner = ShardSavePlanner([])
    planner.set_up_planner({}, is_coordinator=True)
    # Of a single plan, torch does not check that the shards fill their tensors.
    metadata: Metadata = planner.create_global_plan([*plans, SavePlan([])])[1]
    results = [
        WriteResult(item.index, length, _StorageInfo(path, begin, length))
        for (path, record), plan in zip(((path, records[path]) for path in outputs), plans, strict=True)
        for item, (begin, length) in zip(plan.items, record["places"], strict=True)
    ]
    writer = ShardWriter(folder)
    writer.finish(metadata, [results])
    return {path: FileRecord(records[path]["bytes"], records[path]["crc32"]) for path in outputs} | writer.records
