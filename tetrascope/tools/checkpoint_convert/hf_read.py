"""A Hugging Face folder as logical tensors, in any of its family's layouts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrascope.engine.hf_files import FORMATS, TensorFolder
from tetrascope.engine.logical import Shard
from tetrascope.engine.source import PARTS, HuggingFaceFolder, read_hf_config
from tetrascope.errors import UserError
from tetrascope.models.weights import CheckpointLayout, HFTensor, logical_tensors, relative
from tetrascope.tools.checkpoint_convert.formats import Companions, Options, Origin
from tetrascope.tools.checkpoint_convert.megatron.causal_lm import any_family_of
from tetrascope.tools.checkpoint_convert.safetensors_file import SafetensorsFile

WEIGHTS = r".*\.(safetensors|bin|bin\.index\.json|pt|pth|ckpt|h5|msgpack|gguf|onnx)"
"""Files that hold weights, or say where they are other than in safetensors."""


class _StreamedFolder(TensorFolder):
    """Reads rows of safetensors instead of mapping the files. `files`: tensor -> file, by place in the folder."""

    def _open(self, path: Path) -> Any:
        if path.suffix == ".safetensors" and path not in self._files and path.is_file():
            self._files[path] = SafetensorsFile(path)
        return super()._open(path)

    def dtype(self, name: str) -> torch.dtype:
        file, inside = self._find(name)
        if isinstance(file, SafetensorsFile):
            return file.dtype(inside)
        return file.read(inside, ()).dtype

    @property
    def files(self) -> dict[str, str]:
        return {name: str(path.relative_to(self.folder)) for name, (path, _) in self._where.items()}


class _Source(HuggingFaceFolder):
    """The folder, of which tensors may be allowed to be missing or unused, and rows beyond the vocabulary padding."""

    def __init__(
        self, folder: Path, layouts: Mapping[str, CheckpointLayout], config: Any, allow: Sequence[str]
    ) -> None:
        self._allow, self.absent, self.unused, self.padded = allow, frozenset[str](), list[str](), dict[str, int]()
        self._vocabulary: frozenset[str] = frozenset()
        super().__init__(folder, layouts, config, field="SRC")
        own = layouts[self.layout].weights(config)
        self.own = logical_tensors(own)
        self._vocabulary = frozenset(p.tensor.name for name in ("embed.weight", "head.weight") for p in own[name])

    def _open_files(self, folder: Path, subfolders: Iterable[str]) -> TensorFolder:
        return _StreamedFolder(folder, subfolders)

    def _allowed(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self._allow)

    def _recognise(self, layouts: Mapping[str, CheckpointLayout], config: Any) -> str:
        names = list(self.files.names())
        differences = {name: layout.differences(config, names) for name, layout in layouts.items()}
        nearest = min(differences, key=lambda name: sum(map(len, differences[name])))
        missing, odd = differences[nearest]
        refused = {
            "lacks": [name for name in missing if not self._allowed(name)],
            "holds, unused by the model,": [name for name in odd if not self._allowed(name)],
        }
        if any(refused.values()):
            what = " and ".join(f"{verb} {_some(found)}" for verb, found in refused.items() if found)
            raise UserError(
                f"{self.folder}: taken for layout {nearest!r}, it {what}; give a complete checkpoint of the model that "
                "its config.json describes, or name what may be missing or unused with --allow REGEX"
            )
        self.absent = frozenset(missing)
        layout = layouts[nearest]
        known = logical_tensors(layout.weights(config)).keys() | layout.copies(config).keys()
        self.unused = sorted(set(names) - known)
        return nearest

    def check(self) -> None:
        for name, tensor in self._tensors.items():
            if name not in self.absent:
                self._check_shape(tensor)
        for original, copy in self._copies.items():
            if original not in self.absent:
                self._check_shape(replace(self._tensors[original], name=copy))

    def _check_shape(self, tensor: HFTensor) -> None:
        found = self.files.shape(tensor.name)
        name = next((o for o, copy in self._copies.items() if copy == tensor.name), tensor.name)
        if name in self._vocabulary and found[1:] == tensor.shape[1:] and found[0] > tensor.shape[0]:
            self.padded[tensor.name] = found[0]
            return
        super()._check_shape(tensor)


class HFReader:
    """`Reader` of a Hugging Face folder.

    Raises UserError when config.json is of no known family, when the tensors are not the model's, and for damaged
    files.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        raw = read_hf_config(path)
        try:
            self.family = any_family_of(raw)
            self.config: Any = self.family.from_hf(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self._source = _Source(path, self.family.layouts, self.config, options.allow)
        self._source.check()
        self._files: Any = self._source.files
        self.layout = self._source.layout
        own = self.family.layouts[self.layout]
        self._pieces = relative(self.family.weights(self.config), own.weights(self.config))
        absent = self._source.absent
        self.tensors: Mapping[str, HFTensor] = {
            name: tensor
            for name, tensor in logical_tensors(self.family.weights(self.config)).items()
            if not absent & {piece.tensor.name for piece in self._pieces[name]}
        }
        self.drift: Mapping[str, float] = {}
        self.absent = frozenset(logical_tensors(self.family.weights(self.config))) - self.tensors.keys()

    @property
    def notes(self) -> list[str]:
        """What is left out."""
        found = [f"layout {self.layout!r}"]
        found += [f"{name}: rows from {self._rows(name)} on are padding of the vocabulary" for name in self._padded]
        if self._source.unused:
            found.append(f"left out: {_some(self._source.unused)}, no parameters")
        if self._source.absent:
            found.append(f"missing, as allowed: {_some(sorted(self._source.absent))}")
        return found

    @property
    def _padded(self) -> list[str]:
        return sorted(self._source.padded)

    def _rows(self, name: str) -> int:
        originals = self.family.layouts[self.layout].copies(self.config)
        return self._source.own[originals.get(name, name)].shape[0]

    def dtype(self, name: str) -> torch.dtype:
        """What a logical tensor is stored in. Raises UserError when its parts are not all of one dtype."""
        found = {self._files.dtype(piece.tensor.name): piece.tensor.name for piece in self._pieces[name]}
        if len(found) > 1:
            what = ", ".join(f"{part} {dtype}" for dtype, part in found.items())
            raise UserError(f"{self.path}: parts of {name} have several dtypes ({what}); convert them to one first")
        return next(iter(found))

    def read(self, name: str, start: int, rows: int) -> Tensor:
        """Rows of a logical tensor. Raises UserError when a tied copy of it differs."""
        matrix = self.tensors[name].matrix
        there = torch.empty((rows, *matrix[1:]), device="meta")
        return self._source(Shard(name, matrix, (start, *(0 for _ in matrix[1:])), there))

    def companions(self) -> Companions:
        """All files beside the weights, and which file holds which tensor."""
        dropped = set(self._source.unused)
        places = {name: file for name, file in self._files.files.items() if name not in dropped}
        return Companions(companion_files(self.path), Origin(self.layout, places))


def companion_files(folder: Path) -> dict[str, Path]:
    """The files of a Hugging Face folder, and of the parts in it, that hold no weights: place in it -> file."""
    return {str(path.relative_to(folder)): path for path in _files(folder) if not re.fullmatch(WEIGHTS, path.name)}


def _files(folder: Path) -> Iterator[Path]:
    for place in (folder, *(folder / part for part in PARTS)):
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if path.is_file() and not path.name.startswith("."))


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder has what a Hugging Face checkpoint begins with."""
    return (folder / "config.json").is_file() and any(
        (place / name).exists()
        for place in (folder, *(folder / part for part in PARTS))
        for file, _ in FORMATS
        for name in (file, f"{file}.index.json")
    )


def _some(names: Sequence[str]) -> str:
    """The first of many names."""
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
