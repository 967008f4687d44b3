"""Where the logical tensors of a new run come from: random numbers, a Hugging Face folder, or memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.models.weights import HFTensor

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
    """A Hugging Face checkpoint folder, read lazily: only the rows and columns that are asked for.

    Raises UserError for a folder without safetensors files, a missing tensor, or one of another shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                self._where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index}: holds no weight_map ({error!r}); copy it again") from error
        elif (folder / "model.safetensors").exists():
            self._where = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(
                f"model.init_from: {folder} has no model.safetensors; give a Hugging Face checkpoint folder"
            )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            from safetensors import SafetensorError, safe_open

            try:
                self._files[file] = safe_open(str(self.folder / file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.folder / file}: cannot be read ({error}); copy it again") from error
        return self._files[file]

    def check(self, tensors: Iterable[HFTensor]) -> None:
        """Raises UserError unless the folder holds just these tensors, in these shapes. Reads headers only."""
        expected = {tensor.name: tensor.shape for tensor in tensors}
        missing, unread = sorted(expected.keys() - self._where), sorted(self._where.keys() - expected)
        if missing or unread:
            parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"holds {_some(unread)} besides"] * bool(unread)
            raise UserError(
                f"model.init_from: {self.folder} {' and '.join(parts)}; it belongs to another model or is incomplete"
            )
        for name, shape in expected.items():
            found = tuple(self._open(self._where[name]).get_slice(name).get_shape())
            if found != shape:
                raise UserError(f"{self.folder}: {name} has shape {found}, the configuration expects {shape}")

    def __call__(self, shard: Shard) -> Tensor:
        if shard.name not in self._where:
            raise UserError(f"{self.folder}: has no tensor {shard.name!r}, which the model needs")
        view = self._open(self._where[shard.name]).get_slice(shard.name)
        shape = tuple(view.get_shape())
        if len(shape) > 2:
            tensor: Tensor = view[:]
            if tensor.numel() == torch.Size(shard.shape).numel() and shape[0] == shard.shape[0]:
                return _cut(tensor, shard)
        if shape != shard.shape:
            raise UserError(f"{self.folder}: {shard.name} has shape {shape}, the configuration expects {shard.shape}")
        return view[tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))]


def _some(names: list[str]) -> str:
    """The first of many names."""
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The contents of a Hugging Face folder's config.json. Raises UserError when it cannot be read."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json: cannot be read ({error}); give a Hugging Face folder") from error
    return config
