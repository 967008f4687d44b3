"""The format `native`: checkpoints of runs, and first ones that a run can go on from."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tetrascope
from tetrascope.engine.checkpoint import FORMAT as STATE_FORMAT
from tetrascope.engine.checkpoint import STATE_FILE, FileRecord, checksum_problems, problem, read_state
from tetrascope.engine.checkpoint.files import checksum, write_file
from tetrascope.engine.checkpoint.manifest import write_manifest
from tetrascope.engine.config import Config
from tetrascope.engine.config_file import validated
from tetrascope.engine.logical import Shard
from tetrascope.engine.plan.cursor import Cursor
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.models.weights import Piece, logical_tensors
from tetrascope.tools.checkpoint_convert.dcp import DcpFolder, write_dcp_file, write_dcp_metadata
from tetrascope.tools.checkpoint_convert.formats import (
    DTYPES,
    FILE_BYTES,
    Companions,
    Format,
    Options,
    Origin,
    Output,
    Reader,
    Rows,
    Target,
)
from tetrascope.tools.checkpoint_convert.shards import parse_shards, shards_of_ranks, whole_tensors

KEPT = "hf"
"""Folder of a checkpoint for the files that came with a Hugging Face folder, and the key of state.json about it."""

MOMENTS = "optimizer."
"""What the names of optimizer state begin with."""


class NativeReader:
    """`Reader` of a run's checkpoint, optimizer state left out.

    Raises UserError for a checkpoint that is damaged or of another model than its state.json says.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self._state = read_state(path)
        if wrong := problem(path):
            raise UserError(f"{path}: damaged ({wrong}); convert another checkpoint")
        self.family = get_family(self._state["family"])
        self.config: Any = validated(self.family.config_class, self._state["model"], str(path))
        self._folder = DcpFolder(path)
        expected = logical_tensors(self.family.weights(self.config))
        saved = {name for name in self._folder.tensors if not name.startswith(MOMENTS)}
        self._moments = len(self._folder.tensors) - len(saved)
        refused = [
            f"{verb} {name}"
            for verb, names in (("lacks", expected.keys() - saved), ("holds, unused,", saved - expected.keys()))
            for name in sorted(names)
            if not any(re.fullmatch(pattern, name) for pattern in options.allow)
        ]
        if refused:
            raise UserError(f"{path}: {refused[0]}; it belongs to another model, or name it with --allow REGEX")
        self.tensors = {name: tensor for name, tensor in expected.items() if name in saved}
        for name, tensor in self.tensors.items():
            if (found := tuple(self._folder.tensors[name].size)) != tensor.matrix:
                raise UserError(f"{path}: {name} has shape {found}, the model's has {tensor.matrix}")
        self.absent = frozenset(expected.keys() - saved)
        self.drift: Mapping[str, float] = {}

    @property
    def notes(self) -> list[str]:
        """What is left out."""
        found = [f"step {self._state['step']}"]
        return found + [f"left out: optimizer state ({self._moments} tensors)"] * bool(self._moments)

    def dtype(self, name: str) -> torch.dtype:
        """What a logical tensor is stored in."""
        return self._folder.dtype(name)

    def read(self, name: str, start: int, rows: int) -> Tensor:
        """Rows of a logical tensor."""
        return self._folder.read(name, start, rows)

    def companions(self) -> Companions:
        """What was kept of the Hugging Face folder that it was made from, or what its run's configuration says."""
        if (kept := self._state.get(KEPT)) is not None:
            files = {place: self.path / KEPT / place for place in kept["files"]}
            return Companions(files, Origin(**kept["origin"]) if kept["origin"] else None)
        if "config" not in self._state:
            return Companions()
        run: Config = validated(Config, self._state["config"], str(self.path))
        return Companions(tokenizer=run.data.tokenizer, media=run.data)

    def check_bytes(self) -> None:
        """Reads all files. Raises UserError when one is not what was written."""
        if wrong := checksum_problems(self.path):
            raise UserError(f"{self.path}: damaged ({wrong[0]}); convert another checkpoint")


class NativeWriter:
    """`Writer` of a checkpoint of no steps: weights in the dtype of the source or the one asked for, without moments.

    Each shard lies in the file of the rank that would save it in `Options.shards`. Files that came with the model are
    kept, so that it can be written as a Hugging Face folder again.

    Raises UserError when the source is native already, or lacks tensors.
    """

    def __init__(self, reader: Reader, options: Options) -> None:
        if isinstance(reader, NativeReader):
            raise UserError(f"{reader.path}: is native already, and any layout loads it as it is; choose another --to")
        if options.layout is not None:
            raise UserError("--layout: means nothing to native checkpoints, which have one; leave it out")
        self._reader, self._dtype = reader, options.dtype
        family, config = reader.family, reader.config
        if missing := sorted(logical_tensors(family.weights(config)).keys() - reader.tensors.keys()):
            raise UserError(
                f"{reader.path}: lacks {len(missing)} tensors of the model ({missing[0]}, …), and a native checkpoint "
                "needs all of them; give a checkpoint of the whole model"
            )
        ranks = shards_of_ranks(family, config, *parse_shards(options.shards)) if options.shards else None
        self._shards: dict[str, list[Shard]] = {}
        outputs = []
        for rank, held in enumerate(ranks or whole_tensors(family, config)):
            for number, group in enumerate(self._by_size(held, options)):
                path = f"__{rank}_{number}.distcp"
                outputs.append(Output(path, tuple(target for target, _ in group)))
                self._shards[path] = [shard for _, shard in group]
        self.outputs: Sequence[Output] = outputs

    def _by_size(self, shards: Sequence[Shard], options: Options) -> Iterator[list[tuple[Target, Shard]]]:
        """The shards of a rank in groups, a file each."""
        group: list[tuple[Target, Shard]] = []
        size, limit = 0, options.file_bytes or FILE_BYTES
        for shard in shards:
            dtype = DTYPES[options.dtype] if options.dtype else self._reader.dtype(shard.name)
            target = self._target(shard, dtype)
            if group and size + target.nbytes > limit:
                yield group
                group, size = [], 0
            group.append((target, dataclasses.replace(shard, tensor=shard.tensor.to(dtype))))
            size += target.nbytes
        if group:
            yield group

    def _target(self, shard: Shard, dtype: torch.dtype) -> Target:
        shape = tuple(shard.tensor.shape)
        columns = range(shard.offset[1], shard.offset[1] + shape[1]) if len(shape) > 1 else None
        piece = Piece(self._reader.tensors[shard.name], shard.offset[0], shape[0])
        return Target(shard.name, shape, dtype, (piece,), None if columns == range(shard.shape[-1]) else columns)

    def write(self, output: Output, folder: Path, rows: Rows) -> dict[str, Any]:
        """Writes one file of shards."""
        return write_dcp_file(output, folder, rows)

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        """Writes the list of contents, what came with the model, state.json, and the manifest last."""
        files = write_dcp_metadata(folder, self._shards, records)
        kept = self._reader.companions()
        origin = kept.origin and dataclasses.replace(kept.origin, dtype=self._dtype or kept.origin.dtype)
        for place, source in kept.files.items():
            copy = folder / KEPT / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            files[f"{KEPT}/{place}"] = FileRecord(copy.stat().st_size, checksum(copy))
        state = {
            "format": STATE_FORMAT,
            "step": 0,
            "adam_steps": 0,
            "versions": {"tetrascope": tetrascope.__version__, "torch": torch.__version__},
            "family": self._reader.family.name,
            "model": dataclasses.asdict(self._reader.config),
            "cursor": Cursor().to_json(),
            KEPT: {"files": sorted(kept.files), "origin": dataclasses.asdict(origin) if origin else None},
        }
        files[STATE_FILE] = write_file(folder / STATE_FILE, json.dumps(state, indent=1).encode())
        write_manifest(folder, files)


def _is_native(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file()


FORMAT = Format("native", _is_native, NativeReader, NativeWriter, f"{STATE_FILE} of a run's checkpoint folder")
