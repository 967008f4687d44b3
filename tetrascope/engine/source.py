"""Where the logical tensors of a new run come from: random numbers, a Hugging Face folder, or memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrascope.engine.hf_files import TensorFolder
from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.models.weights import (
    CheckpointLayout,
    HFTensor,
    Piece,
    WeightMap,
    logical_tensors,
    relative,
    rows_of,
)

Source = Callable[[Shard], Tensor]
"""A shard (name, offset, shape of its rectangle) -> the numbers that belong in it."""


def fill(shards: Iterable[Shard], source: Source) -> None:
    """Fills the shards' memory."""
    with torch.no_grad():
        for shard in shards:
            shard.tensor.copy_(source(shard))


def _cut(tensor: Tensor, shard: Shard) -> Tensor:
    whole = tensor.reshape(shard.shape)
    return whole[tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))]


def random_source(seed: int, initial: Callable[[str, tuple[int, ...]], tuple[str, float]]) -> Source:
    """Fresh weights, the same in every layout: each logical tensor has a generator of its own, seeded by its name."""

    def source(shard: Shard) -> Tensor:
        kind, value = initial(shard.name, shard.shape)
        if kind == "constant":
            return torch.full(shard.tensor.shape, value)
        digest = hashlib.sha256(f"{seed}/{shard.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return _cut(torch.randn(shard.shape, generator=generator) * value, shard)

    return source


def memory_source(tensors: Mapping[str, Tensor]) -> Source:
    """From a state dict with Hugging Face names."""
    return lambda shard: _cut(tensors[shard.name], shard)


class HuggingFaceFolder:
    """A Hugging Face checkpoint folder in any of a family's layouts, read lazily: only the rows and columns asked for.

    Which layout it is follows from its tensor names. Raises UserError for a folder without tensor files, and for one
    that lacks tensors of the model or holds others besides: by names here, by shapes in `check`.

    field: of the configuration, for messages. model: the map of the logical tensors, of a model that the folder holds
    a part of; None: the folder holds all of it, and the first layout is canonical.
    """

    def __init__(
        self,
        folder: Path,
        layouts: Mapping[str, CheckpointLayout],
        config: Any,
        field: str = "model.init_from",
        model: WeightMap | None = None,
    ) -> None:
        self.field = field
        maps = {name: layout.weights(config) for name, layout in layouts.items()}
        subfolders = {name.rpartition("/")[0] for weights in maps.values() for name in logical_tensors(weights)} - {""}
        self.files = self._open_files(folder, subfolders)
        self.folder = folder
        self.layout = self._recognise(layouts, config)
        own = maps[self.layout]
        canonical = next(iter(maps.values())) if model is None else {name: model[name] for name in own}
        self._tensors = logical_tensors(own)
        self._logical = logical_tensors(canonical)
        self._pieces = relative(canonical, own)
        copies = layouts[self.layout].copies(config)
        self._copies = {original: copy for copy, original in copies.items() if copy in self.files.names()}

    def _open_files(self, folder: Path, subfolders: Iterable[str]) -> TensorFolder:
        return TensorFolder(folder, subfolders)

    def _recognise(self, layouts: Mapping[str, CheckpointLayout], config: Any) -> str:
        """The layout that the folder's tensor names fit. Raises UserError with what the nearest one misses."""
        differences = {name: layout.differences(config, self.files.names()) for name, layout in layouts.items()}
        nearest = min(differences, key=lambda name: sum(map(len, differences[name])))
        missing, odd = differences[nearest]
        if missing or odd:
            parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"holds {_some(odd)} besides"] * bool(odd)
            raise UserError(
                f"{self.field}: {self.folder}, taken for layout {nearest!r}, {' and '.join(parts)}; "
                "it belongs to another model or is incomplete"
            )
        return nearest

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def logical(self) -> Mapping[str, HFTensor]:
        """The logical tensors that the folder has the numbers of."""
        return self._logical

    def check(self) -> None:
        """Raises UserError unless all tensors have the shapes that the configuration gives. Reads headers only."""
        for tensor in self._tensors.values():
            self._check_shape(tensor)
        for original, copy in self._copies.items():
            self._check_shape(replace(self._tensors[original], name=copy))

    def _check_shape(self, tensor: HFTensor) -> None:
        found = self.files.shape(tensor.name)
        if found != tensor.shape:
            raise UserError(f"{self.folder}: {tensor.name} has shape {found}, the configuration expects {tensor.shape}")

    def __call__(self, shard: Shard) -> Tensor:
        """The numbers of a shard of a logical tensor."""
        if shard.name not in self._logical:
            raise UserError(f"{self.folder}: has no tensor {shard.name!r}, which the model needs")
        if shard.shape != self._logical[shard.name].matrix:
            raise ValueError(f"{shard.name} is {self._logical[shard.name].matrix}, not {shard.shape}")
        rows = shard.tensor.shape[0]
        columns = tuple(slice(o, o + n) for o, n in zip(shard.offset[1:], shard.tensor.shape[1:], strict=True))
        pieces = rows_of(self._pieces[shard.name], shard.offset[0], rows)
        parts = [self._read(piece, columns) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, piece: Piece, columns: tuple[slice, ...]) -> Tensor:
        place = (slice(piece.start, piece.start + piece.rows), *columns)
        numbers = self._read_tensor(piece.tensor, place)
        copy = self._copies.get(piece.tensor.name)
        if copy is None:
            return numbers
        same = self._read_tensor(replace(piece.tensor, name=copy), place)
        if same.dtype != numbers.dtype or not torch.equal(same, numbers):
            raise UserError(
                f"{self.folder}: {copy} differs from {piece.tensor.name}, but the configuration ties the two; "
                "set tie_word_embeddings to false in config.json, or remove the one that does not count"
            )
        return numbers

    def _read_tensor(self, tensor: HFTensor, place: tuple[slice, ...]) -> Tensor:
        self._check_shape(tensor)
        if tensor.shape == tensor.matrix:
            return self.files.read(tensor.name, place)
        return self.files.read(tensor.name).reshape(tensor.matrix)[place]


def _some(names: list[str]) -> str:
    """The first of many names."""
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


PARTS = ("llm", "mm_projector", "vision_tower")
"""Subfolders with a config.json of their own, in checkpoints that keep the parts of a model apart, as VILA's do."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The contents of a Hugging Face folder's config.json; those of its PARTS, where there are any, under their names.

    Raises UserError when one cannot be read.
    """
    config = _read_json(folder / "config.json")
    return config | {part: _read_json(path) for part in PARTS if (path := folder / part / "config.json").exists()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a Hugging Face folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; give a Hugging Face folder")
    return content
