"""Megatron's indexed data sets: what megatron-core's own builder writes comes back, and damage is said, not mapped."""

from __future__ import annotations

import builtins
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from tetrascope.engine.data.sources.base import BadSample
from tetrascope.engine.data.sources.megatron import HEADER, MegatronTokens
from tetrascope.engine.data.store import Store, StoreOptions
from tetrascope.errors import UserError

SEQUENCES = [[1, 2, 3], [65535], list(range(100, 140)), [], [7, 8]]


def build(prefix: Path, dtype: Any = np.int32, sequences: list[list[int]] = SEQUENCES) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for one in sequences:
        builder.add_item(torch.tensor(one, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_sequences_by_number(tmp_path: Path, dtype: Any, suffix: str) -> None:
    prefix = build(tmp_path / "tokens", dtype)
    source = MegatronTokens(f"{prefix}{suffix}", Store(str(tmp_path)))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.stamp() == source.stamp()
    numbers = [0, 1, 2, 4]
    for opened in (source, copy):
        assert len(opened) == len(SEQUENCES)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(opened.record, numbers * 10))
        assert [one.tokens.tolist() for one in found if one.tokens is not None] == [SEQUENCES[i] for i in numbers] * 10
        assert {str(one.tokens.dtype) for one in found if one.tokens is not None} == {"int64"}
        assert found[2].name == "sequence 2" and found[2].messages is None
        with pytest.raises(BadSample) as bad:
            opened.record(3)
        assert bad.value.kind == "nothing to learn"
        with pytest.raises(IndexError):
            opened.record(5)
    assert not torch.cuda.is_initialized()


def test_remote_files_are_copied_once(tmp_path: Path) -> None:
    prefix = build(tmp_path / "tokens")
    for suffix in (".bin", ".idx"):
        fsspec.filesystem("memory").pipe_file(f"/megatron/t{suffix}", Path(f"{prefix}{suffix}").read_bytes())
    store = Store("memory://megatron", StoreOptions(cache_dir=tmp_path / "cache"))
    source = pickle.loads(pickle.dumps(MegatronTokens("memory://megatron/t", store)))
    assert source.record(2).tokens.tolist() == SEQUENCES[2]
    assert len(list((tmp_path / "cache").iterdir())) == 4  # two copies and their two common names


def test_damage_is_a_user_error(tmp_path: Path) -> None:
    def damaged(change: Any) -> str:
        prefix = build(tmp_path / "tokens")
        change(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
        with pytest.raises(UserError) as found:
            MegatronTokens(str(prefix), Store(str(tmp_path)))
        return str(found.value)

    assert "tokens.bin cannot be read" in damaged(lambda bin, idx: bin.unlink())
    assert "tokens.idx cannot be read" in damaged(lambda bin, idx: idx.unlink())
    assert "is no index" in damaged(lambda bin, idx: idx.write_bytes(b"x" * 100))
    assert "is no index" in damaged(lambda bin, idx: idx.write_bytes(b""))
    assert "copy the file again" in damaged(lambda bin, idx: idx.write_bytes(idx.read_bytes()[:-1]))
    assert "copy the file again" in damaged(lambda bin, idx: bin.write_bytes(bin.read_bytes()[:-1]))
    assert "holds no samples" in damaged(lambda bin, idx: bin.write_bytes(b""))

    def set_code(bin: Path, idx: Path) -> None:
        raw = bytearray(idx.read_bytes())
        raw[17] = 99
        idx.write_bytes(raw)

    def other_documents(bin: Path, idx: Path) -> None:
        raw = bytearray(idx.read_bytes())
        raw[-8:] = struct.pack("<q", 4)  # the last document's end is no longer the number of sequences
        idx.write_bytes(raw)

    assert HEADER.size == 34
    assert "code 99; expected tokens" in damaged(set_code)
    assert "make the data set again" in damaged(other_documents)


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tokens"):
        MegatronTokens(str(build(tmp_path / "t", np.float32)), Store())


def test_without_megatron_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = build(tmp_path / "tokens")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'tetrascope\[megatron\]'"):
        MegatronTokens(str(prefix), Store())
