"""Safetensors files by row ranges. The oracle is the library: it reads what is written, and writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tetrascope.errors import UserError
from tetrascope.tools.checkpoint_convert.safetensors_file import (
    DTYPES,
    SafetensorsFile,
    file_order,
    write_file,
)


def tensors() -> dict[str, torch.Tensor]:
    """Some of every dtype, with names out of order, a scalar, and one without numbers."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{letter}.{name}": (torch.randn(5, 3, generator=generator) * 50).to(dtype)
        for letter, (name, dtype) in zip("qwertyuiopas", DTYPES.items(), strict=True)
    }
    return {**found, "é": torch.randn(7), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / "theirs", metadata={"format": "pt"})
    entries = file_order((name, tensor.dtype, tensor.shape) for name, tensor in content.items())
    write_file(tmp_path / "ours", entries, (content[name].reshape(-1) for name, _, _ in entries))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_reading_parts(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / "file")
    file = SafetensorsFile(tmp_path / "file")
    assert set(file.names()) == content.keys()
    for name, tensor in content.items():
        assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert same_bits(file.read(name, ()), tensor)
    for place in ((slice(1, 4),), (slice(2, 5), slice(1, 2)), (slice(None), slice(2, None)), (slice(3, 3),)):
        assert same_bits(file.read("w.F64", place), content["w.F64"][place])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """fp8 tensors cannot be compared otherwise."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bytes(a.contiguous().reshape(-1).view(torch.uint8)) == bytes(b.contiguous().reshape(-1).view(torch.uint8))
    )


def rewrite(path: Path, of: str, **change: object) -> None:
    """Changes an entry of the header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[of].update(change)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        {"of": "b", "dtype": "F99"},
        {"of": "b", "shape": [2, 4]},
        {"of": "b", "shape": "two"},
        {"of": "b", "data_offsets": [8, 32]},
        {"of": "b", "data_offsets": [12, 36, 40]},
        {"of": "a", "data_offsets": [4, 16]},
    ],
    ids=str,
)
def test_headers_that_speak_of_other_bytes(change: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a": torch.randn(3), "b": torch.randn(2, 3)}, tmp_path / "file")
    SafetensorsFile(tmp_path / "file")
    rewrite(tmp_path / "file", **change)
    with pytest.raises(UserError, match=r"file: damaged safetensors header \(.*\); copy it again"):
        SafetensorsFile(tmp_path / "file")


def test_a_header_length_of_nonsense(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"the file has 64 bytes, its header should have 18446744073709551615"):
        SafetensorsFile(tmp_path / "file")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100, 100)}, tmp_path / "file")
    file = SafetensorsFile(tmp_path / "file")
    with (tmp_path / "file").open("r+b") as shrinking:
        shrinking.truncate(1000)
    with pytest.raises(UserError, match=r"ends \d+ bytes before its tensor does; copy it again"):
        file.read("a", (slice(50, 60),))
