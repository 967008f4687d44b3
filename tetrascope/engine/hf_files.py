"""The tensor files of a Hugging Face checkpoint folder, read lazily by tensor name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor

from tetrascope.errors import UserError


class _File(Protocol):
    """An open tensor file. Its methods raise KeyError for a tensor that is not in it."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, place: tuple[slice, ...]) -> Tensor: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
        self._names = frozenset(self._file.keys())

    def names(self) -> Iterable[str]:
        return self._names

    def _slice(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        tensor: Tensor = self._slice(name)[place or ...]
        return tensor


class _Pickled:
    """`pytorch_model.bin`, memory-mapped. Nothing but tensors is unpickled: such a file cannot run code."""

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{path}: holds no state dict of tensors; give the checkpoint's model weights")
        self._tensors: dict[str, Tensor] = content

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        return self._tensors[name][place]


def _is_zip(path: Path) -> bool:
    """Whether torch can map the file: before torch 1.6, files were of another kind, which is read whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, error: Exception) -> UserError:
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"{path}: cannot be read ({cause[0]}); copy it again")


FORMATS = (("model.safetensors", _Safetensors), ("pytorch_model.bin", _Pickled), ("mm_projector.bin", _Pickled))
"""Single file (its index is called the same with .index.json) -> reader; the first that is there counts. The last one
is the adaptor that LLaVA's first stage of training writes."""


class TensorFolder:
    """The tensors of a checkpoint folder and of some of its subfolders, under names such as `llm/model.norm.weight`.

    Reads the index, or the headers of a single file; other files when a tensor in them is asked for. Raises UserError
    for a folder without tensor files and for files that cannot be read.
    """

    def __init__(self, folder: Path, subfolders: Iterable[str] = ()) -> None:
        self.folder = folder
        self._files: dict[Path, _File] = {}
        self._where = {
            prefix + name: (path, name)
            for prefix, place in (("", folder), *((f"{sub}/", folder / sub) for sub in sorted(subfolders)))
            for name, path in self._list(place)
        }
        if not self._where:
            files = " or ".join(name for name, _ in FORMATS)
            raise UserError(f"model.init_from: {folder} has no {files}; give a Hugging Face checkpoint folder")

    def _list(self, folder: Path) -> Iterator[tuple[str, Path]]:
        for file, _ in FORMATS:
            index, single = folder / f"{file}.index.json", folder / file
            if index.exists():
                yield from ((name, folder / part) for name, part in _weight_map(index).items())
                return
            if single.exists():
                yield from ((name, single) for name in self._open(single).names())
                return

    def _open(self, path: Path) -> _File:
        if path not in self._files:
            if not path.is_file():
                raise UserError(f"{path}: cannot be read (no such file, which the index names); copy it again")
            reader = _Safetensors if path.suffix == ".safetensors" else _Pickled
            self._files[path] = reader(path)
        return self._files[path]

    def names(self) -> Iterable[str]:
        return self._where.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        file, inside = self._find(name)
        try:
            return file.shape(inside)
        except KeyError as error:
            raise UserError(f"{self._where[name][0]}: lacks {inside}, which its index names; copy it again") from error

    def read(self, name: str, place: tuple[slice, ...] = ()) -> Tensor:
        """A part of a tensor, or all of it; only that part is read."""
        self.shape(name)  # names a tensor that is not there
        file, inside = self._find(name)
        try:
            return file.read(inside, place)
        except (OSError, RuntimeError) as error:
            raise _unreadable(self._where[name][0], error) from error

    def _find(self, name: str) -> tuple[_File, str]:
        if name not in self._where:
            raise UserError(f"{self.folder}: has no tensor {name!r}, which the model needs")
        path, inside = self._where[name]
        return self._open(path), inside


def _weight_map(index: Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: holds no weight_map ({error!r}); copy it again") from error
