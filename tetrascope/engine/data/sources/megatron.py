"""Megatron's indexed data sets: text that is tokenized already, memory-mapped, in a pair of files .bin and .idx."""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tetrascope.engine.data.sources.base import BadSample, Record
from tetrascope.engine.data.sources.shards import stamp
from tetrascope.engine.data.store import Store, is_remote
from tetrascope.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
INTEGERS = (1, 2, 3, 4, 5, 8)
"""Codes of integer types, 8 to 64 bits; the others are floats (DType of
megatron/core/datasets/indexed_dataset.py)."""

HEADER = struct.Struct("<9sQBQQ")
"""Of the .idx file: MAGIC, version, code of the numbers' type, sequences, documents (_IndexWriter of
the same file)."""


class MegatronTokens:
    """Sequences by number, each a sample of tokens. path: what .bin and .idx are appended to, or one of the two files.

    Remote files are copied into the store's cache first: memory-mapping needs them on this machine.
    Raises UserError when megatron-core is not installed, and for files that are missing, cut or something else.
    """

    def __init__(self, path: str, store: Store) -> None:
        self._store = store
        self._prefix = path.removesuffix(".bin").removesuffix(".idx")
        self._open()

    def _open(self) -> None:
        local = _local_prefix(self._prefix, self._store)
        _check(local)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of CUDA extensions that reading tokens has no use for
                from megatron.core.datasets.indexed_dataset import IndexedDataset
        except ImportError as error:
            raise UserError(
                f"data: {self._prefix} is a Megatron data set, which needs megatron-core ({error}): "
                "pip install 'tetrascope[megatron]'"
            ) from error
        try:
            self._data = IndexedDataset(str(local))
        except (AssertionError, ValueError, OSError) as error:
            raise UserError(f"data: {local}.idx cannot be read ({error}); make the data set again") from error
        index = self._data.index
        ends = index.sequence_pointers + index.sequence_lengths.astype(np.int64) * np.dtype(index.dtype).itemsize
        size = os.path.getsize(f"{local}.bin")
        if len(ends) and ends.max() > size:
            raise UserError(f"data: {local}.bin has {size} bytes, its index says {ends.max()}; copy the file again")

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self._prefix, "store": self._store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"], state["store"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._data)

    def record(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        tokens = np.asarray(self._data[number]).astype(np.int64)
        if not len(tokens):
            raise BadSample("nothing to learn", f"{self._prefix}: sequence {number} is empty")
        return Record(f"sequence {number}", None, (), tokens)

    def stamp(self) -> str:
        return stamp([f"{self._prefix}.bin", f"{self._prefix}.idx"], self._store)


def _local_prefix(prefix: str, store: Store) -> Path:
    """The prefix on this machine. Copies have names of their own: two links give them the one that Megatron expects."""
    if not is_remote(prefix):
        return store.local(prefix)
    copies = [store.local(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    name = hashlib.sha256("".join(copy.name for copy in copies).encode()).hexdigest()[:32]
    for copy in copies:
        link = copy.with_name(f"{name}{copy.suffix}")
        if not link.exists():
            partial = link.with_name(f".{link.name}.{os.getpid()}")
            partial.unlink(missing_ok=True)
            partial.symlink_to(copy.name)
            partial.replace(link)
    return copies[0].with_name(name)


def _check(prefix: Path) -> None:
    """What megatron-core would only assert, or not notice."""
    sizes = {}
    for suffix in (".bin", ".idx"):
        try:
            sizes[suffix] = os.path.getsize(f"{prefix}{suffix}")
        except OSError as error:
            raise UserError(
                f"data: {prefix}{suffix} cannot be read ({error.strerror}); a Megatron data set is a pair of files "
                ".bin and .idx, named without the suffix"
            ) from error
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(HEADER.size)
    magic, version, code, sequences, documents = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1:
        raise UserError(f"data: {prefix}.idx is no index of a Megatron data set (indexed_dataset, version 1)")
    if code not in INTEGERS:
        raise UserError(f"data: {prefix}.bin holds numbers of type code {code}; expected tokens, codes {INTEGERS}")
    needed = HEADER.size + sequences * (4 + 8) + documents * 8
    if sizes[".idx"] < needed:
        raise UserError(f"data: {prefix}.idx has {sizes['.idx']} bytes of {needed}; copy the file again")
    if not sequences or not sizes[".bin"]:
        raise UserError(f"data: {prefix}.bin holds no samples")
