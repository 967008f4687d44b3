"""Hugging Face folders of the families' tiny models, written by the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tetrascope.models.family import Family, get_family
from tetrascope.models.weights import logical_tensors, relative
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families import get_oracle


@cache
def case_of(family: str, variant: str | None = None) -> Case:
    """A case of the family's certificate, the first by default."""
    found = get_oracle(family).variants()
    case: Case = found[variant or next(iter(found))]
    return case


def tensors_of(case: Case, layout: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The case's weights as a layout names and arranges them."""
    family = get_family(case.family)
    weights = family.layouts[layout].weights(case.config)
    pieces = relative(weights, family.weights(case.config))
    found = {}
    for name, tensor in logical_tensors(weights).items():
        rows = [case.weights[p.tensor.name].reshape(p.tensor.matrix)[p.start : p.start + p.rows] for p in pieces[name]]
        found[name] = torch.cat(rows).reshape(tensor.shape).to(dtype).contiguous()
    return found


def write_hf(
    folder: Path,
    case: Case,
    layout: str | None = None,
    dtype: torch.dtype = torch.float32,
    files: int = 1,
    change: Mapping[str, Tensor | None] | None = None,
) -> Path:
    """Writes a folder. files: number of tensor files of each part. change: tensors instead of the model's, or None."""
    family: Family = get_family(case.family)
    layout = layout or next(iter(family.layouts))
    tensors: dict[str, Tensor | None] = {**tensors_of(case, layout, dtype), **(change or {})}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            part, _, base = name.rpartition("/")
            parts.setdefault(part, {})[base] = tensor
    for part, inside in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        _write_part(folder / part, inside, files)
    dtype_name = str(dtype).removeprefix("torch.")
    for path, content in family.layouts[layout].configs(case.config, dtype_name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # Not as this package writes JSON: what is carried over keeps its bytes.
        (folder / path).write_text(json.dumps({**content, "note": "of the source"}, indent=1))
    return folder


def _write_part(folder: Path, tensors: dict[str, Tensor], files: int) -> None:
    if files == 1:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    where: dict[str, Any] = {}
    names = sorted(tensors)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        group = {name: tensors[name] for name in names[number::files]}
        save_file(group, str(folder / file), metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_parameters": 1, "total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
