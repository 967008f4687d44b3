"""Safetensors files read and written by row ranges, with plain reads and writes at offsets.

A file is a length (8 bytes, little-endian), a JSON header of that many bytes with each tensor's dtype, shape and place,
and the tensors' bytes (https://github.com/huggingface/safetensors, README, "Format"). The library maps files into
memory, where every page that was touched counts as the process's until the system needs it elsewhere; it also writes
whole files from memory. Here, neither grows with the size of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrascope.errors import UserError

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in headers, in the order in which the library writes tensors of them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000
"""Bytes of the longest header that the library reads."""

ALIGNMENT = 8
"""The tensors' bytes begin at a multiple of this."""


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def read_into(descriptor: int, tensor: Tensor, offset: int, path: Path) -> Tensor:
    """Fills a contiguous tensor from a file. Raises UserError when the file ends before it is full."""
    memory, done = byte_view(tensor) if tensor.numel() else memoryview(b""), 0
    while done < len(memory):
        try:
            count = os.preadv(descriptor, [memory[done:]], offset + done)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
        if not count:
            raise UserError(f"{path}: ends {len(memory) - done} bytes before its tensor does; copy it again")
        done += count
    return tensor


class SafetensorsFile:
    """A file open for reading; safe to read from in several threads.

    Raises UserError when its header is damaged, or speaks of other bytes than the file has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self._entries, self._begin = self._read_header()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged safetensors header ({error}); copy it again") from error

    def _read_header(self) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], int]], int]:
        """(dtype, shape, offset in the data) by name, and where the data begins. Raises ValueError and the like."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"the file has {size} bytes, its header should have {length if size >= 8 else 8}")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        entries, stop = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            start, end = entry["data_offsets"]
            if start != stop or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has bytes [{start}, {end}), {math.prod(shape)} numbers from {stop} expected")
            entries[name], stop = (dtype, shape, start), end
        if 8 + length + stop != size:
            raise ValueError(f"the file has {size} bytes, by its header {8 + length + stop}")
        return entries, 8 + length

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][0]

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """A part of a tensor; whole rows of it are read."""
        dtype, shape, offset = self._entries[name]
        if not shape:
            return read_into(self._file.fileno(), torch.empty((), dtype=dtype), self._begin + offset, self.path)
        start, stop, _ = (place[0] if place else slice(None)).indices(shape[0])
        row = math.prod(shape[1:]) * dtype.itemsize
        rows = torch.empty((max(0, stop - start), *shape[1:]), dtype=dtype)
        read_into(self._file.fileno(), rows, self._begin + offset + start * row, self.path)
        columns = (slice(None), *place[1:])
        return rows[columns]


Entry = tuple[str, torch.dtype, Sequence[int]]
"""A tensor to be written: name, dtype and shape."""


def file_order(entries: Iterable[Entry]) -> list[Entry]:
    """The order in which the library writes tensors: by dtype, wide ones first, so that all are aligned; by name."""
    order = list(DTYPES.values())
    return sorted(entries, key=lambda entry: (order.index(entry[1]), entry[0]))


def header(entries: Sequence[Entry]) -> bytes:
    """The beginning of a file with these tensors in this order, up to the first tensor's bytes; as the library
    writes it for `metadata={"format": "pt"}`."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, entries: Sequence[Entry], chunks: Iterator[Tensor]) -> None:
    """Writes a file, chunk by chunk, and syncs it to disk. Raises OSError when there is no room.

    chunks: contiguous parts of the tensors, one after the other, in the order of `entries`.
    """
    with path.open("wb") as file:
        file.write(header(entries))
        for chunk in chunks:
            if chunk.numel():
                file.write(byte_view(chunk))
        file.flush()
        os.fsync(file.fileno())
