"""Megatron's older checkpoints, one file a rank: `mp_rank_TT[_PPP]/model_optim_rng.pt`.

The tensors of the ranks are put together: pipeline stages one after another, tensor-parallel shares side by side. The
files are mapped, so that only what is asked for is read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrascope.errors import UserError
from tetrascope.models.weights import HFTensor
from tetrascope.tools.checkpoint_convert.formats import reduce_copies
from tetrascope.tools.checkpoint_convert.megatron.mapping import EXTRA_STATE, split
from tetrascope.tools.checkpoint_convert.megatron.safe_pickle import load_torch_file

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"(.*?layers\.)(\d+)(\..*)")

VERSION = 3.0
"""`checkpoint_version` of all models of Megatron-Core; older ones order the rows of query, key and value otherwise."""


def is_legacy(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return any(_FOLDER.fullmatch(path.name) for path in folder.glob("mp_rank_*"))


class LegacyFolder:
    """Reads the tensors of such a checkpoint, under the names that they have in the whole model, a layer at a time.

    drift: filled, while tensors are read, with the names of those of which the ranks' copies differ, and how far.

    Raises UserError when a file is missing, cannot be read, would run code, or is of expert parallelism or an old kind.
    """

    def __init__(self, folder: Path, drift: dict[str, float]) -> None:
        self.folder = folder
        self._drift = drift
        ranks = self._ranks()
        self.tp = 1 + max(tp for tp, _ in ranks)
        stages = 1 + max(pp for _, pp in ranks)
        missing = [(tp, pp) for tp in range(self.tp) for pp in range(stages) if (tp, pp) not in ranks]
        if missing:
            tp, pp = missing[0]
            raise UserError(f"{folder}: lacks the file of tensor-parallel rank {tp}, pipeline rank {pp}; copy it again")
        files = [[self._open(ranks[tp, pp]) for tp in range(self.tp)] for pp in range(stages)]
        self.arguments: Mapping[str, Any] = files[0][0][1]
        self._check_degrees(self.arguments, stages)
        self._tensors = self._joined([[models for models, _ in stage] for stage in files])

    def _ranks(self) -> dict[tuple[int, int], Path]:
        found: dict[tuple[int, int], Path] = {}
        for path in sorted(self.folder.glob("mp_rank_*")):
            match = _FOLDER.fullmatch(path.name)
            if match is None:
                continue
            if match[3] and int(match[3]):
                raise UserError(f"{path}: is of expert parallelism; the models known here have no experts")
            found[int(match[1]), int(match[2] or 0)] = path / FILE
        return found

    def _open(self, path: Path) -> tuple[list[dict[str, Tensor]], Mapping[str, Any]]:
        """The model of each virtual stage of a rank, and the arguments."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; copy the checkpoint again")
        content = load_torch_file(path)
        if not isinstance(content, dict) or not ("model" in content or "model0" in content):
            raise UserError(f"{path}: holds no model; give a folder of Megatron checkpoints")
        version = content.get("checkpoint_version", 0)
        if version != VERSION:
            raise UserError(
                f"{path}: checkpoint_version is {version}, {VERSION} is needed; save it with a newer Megatron"
            )
        keys = (
            ["model"]
            if "model" in content
            else [f"model{i}" for i in range(sum(f"model{i}" in content for i in range(99)))]
        )
        models = []
        for key in keys:
            model = content[key]
            if not isinstance(model, dict) or any(n.startswith("language_model.encoder.") for n in model):
                raise UserError(f"{path}: {key} is no model of Megatron-Core; save it with --use-mcore-models")
            models.append({n: t for n, t in model.items() if isinstance(t, Tensor) and not EXTRA_STATE.fullmatch(n)})
        arguments = content.get("args")
        return models, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}

    def _check_degrees(self, arguments: Mapping[str, Any], stages: int) -> None:
        for name, found in (("tensor_model_parallel_size", self.tp), ("pipeline_model_parallel_size", stages)):
            if arguments.get(name, found) != found:
                raise UserError(
                    f"{self.folder}: args.{name} is {arguments[name]}, but there are files of {found}; copy it again"
                )

    def _joined(self, stages: list[list[list[dict[str, Tensor]]]]) -> dict[str, list[Tensor]]:
        """Name in the whole model -> the tensor of each tensor-parallel rank. stages: [pp][tp][virtual stage]."""
        found: dict[str, list[Tensor]] = {}
        first: dict[str, int] = {}
        # Layers are dealt out to the first virtual stages of all ranks, then to the second ones.
        for chunk in range(max(len(stage[0]) for stage in stages)):
            for stage in stages:
                ranks = [models[chunk] for models in stage]
                counts: dict[str, int] = {}
                for name in ranks[0]:
                    match = _LAYER.fullmatch(name)
                    if match:
                        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
                        whole = f"{match[1]}{first.get(match[1], 0) + int(match[2])}{match[3]}"
                    else:
                        whole = name
                    tensors = [rank.get(name) for rank in ranks]
                    if any(tensor is None for tensor in tensors):
                        raise UserError(f"{self.folder}: not all tensor-parallel ranks have {name}; copy it again")
                    found[whole] = [tensor for tensor in tensors if tensor is not None]
                for prefix, count in counts.items():
                    first[prefix] = first.get(prefix, 0) + count
        return found

    @property
    def _gated(self) -> bool:
        return bool(self.arguments.get("swiglu", True))

    def names(self) -> Iterable[str]:
        """The tensors' names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, put together."""
        shares, cut = self._tensors[name], split(name, self._gated)
        shape = list(shares[0].shape)
        if cut is not None:
            shape[cut[0]] = sum(share.shape[cut[0]] for share in shares)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._tensors[name][0].dtype

    def read(self, tensor: HFTensor, start: int, rows: int) -> Tensor:
        """The rows [start, start + rows) of a tensor's matrix; of copies that differ, the mean (see `drift`)."""
        name, shares = tensor.name, self._tensors[tensor.name]
        cut = split(name, self._gated)
        if cut is None or self.tp == 1:
            matrices = [share.reshape(-1, *tensor.matrix[1:])[start : start + rows] for share in shares]
            found, drift = reduce_copies(matrices)
            if drift:
                self._drift[name] = max(drift, self._drift.get(name, 0.0))
            return found.clone()
        dim, parts = cut
        if dim == 1:
            return torch.cat([share[start : start + rows] for share in shares], dim=1)
        # The order of rows in the whole: part by part, and of each the ranks' shares.
        pieces = [share.chunk(parts)[part] for part in range(parts) for share in shares]
        chosen, row = [], 0
        for piece in pieces:
            low, high = max(start, row), min(start + rows, row + len(piece))
            if low < high:
                chosen.append(piece[low - row : high - row])
            row += len(piece)
        return torch.cat(chosen).reshape(rows, *tensor.matrix[1:])
