"""Megatron checkpoints as logical tensors: torch_dist folders and the older ones of one file a rank."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tetrascope.engine.config_file import validated
from tetrascope.engine.source import read_hf_config
from tetrascope.errors import UserError
from tetrascope.models.family import Family
from tetrascope.models.weights import HFTensor, Piece, WeightMap, logical_tensors, relative, rows_of
from tetrascope.tools.checkpoint_convert.formats import Companions, Options, Origin, reduce_copies
from tetrascope.tools.checkpoint_convert.megatron import causal_lm
from tetrascope.tools.checkpoint_convert.megatron.arguments import from_arguments
from tetrascope.tools.checkpoint_convert.megatron.legacy import LegacyFolder, is_legacy
from tetrascope.tools.checkpoint_convert.megatron.mapping import EXTRA_STATE, LANGUAGE, UNUSED, VOCABULARY
from tetrascope.tools.checkpoint_convert.megatron.model import (
    WHOLE_MODELS,
    find_family,
    language_map,
    megatron_weights,
    names_of,
)
from tetrascope.tools.checkpoint_convert.megatron.safe_pickle import load_torch_file
from tetrascope.tools.checkpoint_convert.megatron.torch_dist import DcpFolder

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
COMMON, BACKEND, DESCRIPTION, HF_FILES = "common.pt", "metadata.json", "tetrascope.json", "hf"
"""Files of a torch_dist checkpoint; the last two are ours: what the model is, and the files of the Hugging Face folder
that it was made from."""

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\..*|rng_state.*|rerun_state_machine_state.*|opt_param_scheduler.*")
_BUFFERS = re.compile(r".*rotary_pos_emb\.inv_freq")


class Store(Protocol):
    """The tensors of a folder, in whatever files they lie."""

    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, tensor: HFTensor, start: int, rows: int) -> Tensor: ...


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a Megatron checkpoint, or holds some, by its files alone."""
    return (folder / TRACKER).is_file() or is_legacy(folder) or _backend(folder) is not None


def _backend(folder: Path) -> str | None:
    """What `metadata.json` says that the tensors are saved with; None where there is no such file."""
    try:
        found = json.loads((folder / BACKEND).read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint itself: `folder`, or the newest one in it. Raises UserError when it has none."""
    if is_legacy(folder) or _backend(folder) is not None:
        return folder
    tracker = folder / TRACKER
    try:
        newest = tracker.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{tracker}: cannot be read ({error}); give a folder of Megatron checkpoints") from error
    if newest != RELEASE and not newest.isdecimal():
        raise UserError(
            f"{tracker}: holds {newest!r}, neither an iteration nor {RELEASE!r}; give the iteration's folder"
        )
    found = folder / (RELEASE if newest == RELEASE else f"iter_{int(newest):07d}")
    if not is_legacy(found) and _backend(found) is None:
        raise UserError(
            f"{found}: no Megatron checkpoint, though {tracker.name} names it; give the folder of another one"
        )
    return found


def _open_store(folder: Path, drift: dict[str, float]) -> tuple[Store, Mapping[str, Any]]:
    """The tensors of a checkpoint and its arguments, where it has them. drift: see `LegacyFolder`."""
    if is_legacy(folder):
        legacy = LegacyFolder(folder, drift)
        return legacy, legacy.arguments
    if (backend := _backend(folder)) != "torch_dist":
        raise UserError(f"{folder}: is of backend {backend!r}; save it with Megatron's --ckpt-format torch_dist")
    if not (folder / COMMON).is_file():
        raise UserError(f"{folder / COMMON}: no such file, the checkpoint is incomplete; copy it again")
    common = load_torch_file(folder / COMMON)
    arguments = common.get("args") if isinstance(common, dict) else None
    return DcpFolder(folder), vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


class MegatronReader:
    """`Reader` of a Megatron checkpoint.

    What the model is says, in this order: `options.config`; the description that our own writer leaves; Megatron's
    arguments, from which a GPTModel becomes a language model like Llama, Qwen2 or Qwen3. A GPTModel can also be read as
    the language part of a vision-language model, where the rest is allowed to be missing.

    Raises UserError when nothing says it, for tensors of other names or shapes than the model's, missing or damaged
    files, files that would run code.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self._folder = checkpoint_folder(path)
        self._drift: dict[str, float] = {}
        self.drift: Mapping[str, float] = self._drift
        """Tensors by Megatron's names of which several copies were read that differed -> how far."""
        self._store, arguments = _open_store(self._folder, self._drift)
        names = {name for name in self._store.names() if not EXTRA_STATE.fullmatch(name)}
        optimizer = {name for name in names if _OPTIMIZER.fullmatch(name)}
        self.names = names_of(names - optimizer)
        self._description = _read_description(self._folder / DESCRIPTION)
        self.family, self.config = self._model(options, arguments)
        self._allow = options.allow
        self._notes: list[str] = []
        self.notes: Sequence[str] = self._notes
        if optimizer:
            self._notes.append(f"left out: {len(optimizer)} tensors of the optimizer and of other states")
        own, canonical = self._present(names - optimizer)
        self._pieces = relative(canonical, own)
        self.tensors: Mapping[str, HFTensor] = logical_tensors(canonical)
        self.absent = frozenset(logical_tensors(self.family.weights(self.config))) - self.tensors.keys()
        self._check_absent()
        for tensor in logical_tensors(own).values():
            self._check_shape(tensor)

    def _model(self, options: Options, arguments: Mapping[str, Any]) -> tuple[Family, Any]:
        family: Family
        if options.config is not None:
            raw = read_hf_config(options.config)
            try:
                family = causal_lm.any_family_of(raw)
                config = family.from_hf(raw)
            except UserError as error:
                raise UserError(f"--config: {options.config}: {error}") from error
        elif self._description is not None:
            where = str(self._folder / DESCRIPTION)
            family = find_family(str(self._description.get("family")))
            config = validated(family.config_class, self._description.get("model"), where)
        elif not self.names.whole and arguments:
            family, config = causal_lm.FAMILY, from_arguments(arguments, str(self._folder))
        else:
            what = (
                "does not say enough of a vision-language model"
                if self.names.whole
                else "does not say what model it is"
            )
            raise UserError(f"{self._folder}: {what}; give --config with a Hugging Face folder that describes it")
        if self.names.whole and family.name not in WHOLE_MODELS:
            raise UserError(
                f"{self._folder}: holds a LLaVAModel ({LANGUAGE}…), but the model is said to be {family.name}; those "
                f"that Megatron-Core has are {', '.join(WHOLE_MODELS)}"
            )
        return family, config

    def _present(self, names: set[str]) -> tuple[WeightMap, WeightMap]:
        """Megatron's map and the canonical one of the parameters that are there. Raises UserError for a tensor too few
        or too many, but for those that are allowed."""
        own = megatron_weights(self.family, self.config, self.names)
        canonical = self.family.weights(self.config) if self.names.whole else language_map(self.family, self.config)
        self._copies = self._tied_copies(own, names)
        expected = logical_tensors(own).keys()
        missing, odd = expected - names, names - expected - set(self._copies.values())
        odd -= {name for name in odd if _BUFFERS.fullmatch(name)}
        refused = {
            "lacks": [n for n in sorted(missing) if not self._allowed(n, n.removeprefix(UNUSED))],
            "holds, unused by the model,": [n for n in sorted(odd) if not self._allowed(n)],
        }
        if any(refused.values()):
            what = " and ".join(f"{verb} {_some(found)}" for verb, found in refused.items() if found)
            kind = "LLaVAModel" if self.names.whole else "GPTModel"
            raise UserError(
                f"{self._folder}: taken for a {kind} of {self.family.name}, it {what}; give --config with a Hugging "
                "Face folder of the right model, a complete checkpoint, or name what may be missing or unused with "
                "--allow REGEX"
            )
        if odd:
            self._notes.append(f"left out, as allowed: {_some(sorted(odd))}")
        kept = [name for name, pieces in own.items() if not missing & {piece.tensor.name for piece in pieces}]
        return {name: own[name] for name in kept}, {name: canonical[name] for name in kept}

    def _tied_copies(self, own: WeightMap, names: set[str]) -> dict[str, str]:
        """Embedding -> the copy of it that the last pipeline stage saved."""
        embedding = own["embed.weight"][0].tensor.name
        head = embedding.replace("embedding.word_embeddings", "output_layer")
        tied = own["head.weight"][0].tensor.name == embedding
        return {embedding: head} if tied and head in names else {}

    def _check_absent(self) -> None:
        refused = sorted(n for n in self.absent if not self._allowed(n, UNUSED + n))
        if refused:
            raise UserError(
                f"{self._folder}: holds a GPTModel, the language model of {self.family.name} alone, and lacks "
                f"{_some(refused)}; allow these to be missing with --allow REGEX, or give --config with a Hugging Face "
                "folder of the language model to get that by itself"
            )

    def _allowed(self, *names: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self._allow for name in names)

    def _check_shape(self, tensor: HFTensor) -> None:
        found = self._store.shape(tensor.name)
        if found == tensor.shape:
            return
        if VOCABULARY.fullmatch(tensor.name) and found[1:] == tensor.shape[1:] and found[0] > tensor.shape[0]:
            self._notes.append(
                f"{tensor.name}: rows from {tensor.shape[0]} to {found[0]} are padding of the vocabulary"
            )
            return
        raise UserError(
            f"{self._folder}: {tensor.name} has shape {found}, the model needs {tensor.shape}; give --config with a "
            "Hugging Face folder of the right model"
        )

    def dtype(self, name: str) -> torch.dtype:
        """What a logical tensor is stored in."""
        found = {self._store.dtype(piece.tensor.name) for piece in self._pieces[name]}
        dtype = found.pop()
        for other in found:
            dtype = torch.promote_types(dtype, other)
        return dtype

    def read(self, name: str, start: int, rows: int) -> Tensor:
        """Rows [start, start + rows) of a logical tensor as matrix or vector, in its own dtype."""
        parts = [self._read(piece) for piece in rows_of(self._pieces[name], start, rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, piece: Piece) -> Tensor:
        found = self._store.read(piece.tensor, piece.start, piece.rows)
        copy = self._copies.get(piece.tensor.name)
        if copy is None:
            return found
        other = self._store.read(replace(piece.tensor, name=copy), piece.start, piece.rows)
        found, drift = reduce_copies([found, other])
        if drift:
            self._drift[copy] = max(drift, self._drift.get(copy, 0.0))
        return found

    def companions(self) -> Companions:
        """The files of the Hugging Face folder that the checkpoint was made from, where our own writer kept them."""
        kept = self._folder / HF_FILES
        files = {str(path.relative_to(kept)): path for path in sorted(kept.rglob("*")) if path.is_file()}
        origin = (self._description or {}).get("origin")
        if not files or not origin:
            return Companions(files)
        return Companions(files, Origin(str(origin["layout"]), dict(origin["places"])))


def _read_description(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again, or remove it and give --config") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; copy it again, or remove it and give --config")
    return found


def _some(names: Sequence[str]) -> str:
    """The first of many names."""
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
