"""Native checkpoints: logical tensors in a torch.distributed.checkpoint folder.

A checkpoint is `checkpoints/step-000123/`: the fp32 master weights and optimizer moments, each saved once by the rank
that owns it with its place in the whole tensor, so that any layout loads what any other saved; and `state.json` with
the step, the position in the data and the configuration. It is written under a temporary name and renamed when
complete: a folder with a final name is whole.

What is frozen is saved in the run's own dtype, which loses nothing, and without moments. A run may train other parts
than the one that saved: what it freezes, it loads without moments; what it trains and the other froze, starts with
moments of zero. Adam's step count, which serves its bias correction and nothing else, then starts at zero again for
all parameters: exact for the new ones, and after 1 / (1 - beta) steps without a trace in the others. The alternative,
to go on counting, would make the first steps of the new ones up to 6 times too long (betas 0.9 and 0.999).
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tetrascope.engine.build import StageModel
from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.parallel.zero.optimizer import STATES, ZeroAdamW

FORMAT = 1
STATE_FILE = "state.json"


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(shard.offset), sizes=shard.tensor.shape)


def _index(shard: Shard) -> MetadataIndex:
    return MetadataIndex(shard.name, torch.Size(shard.offset))


class _ShardSavePlanner(DefaultSavePlanner):
    """Plans the writing of shards; torch's default planner then checks that they cover every tensor exactly once."""

    def __init__(self, shards: list[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = {_index(shard): shard for shard in shards}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(shard),
                        properties=TensorProperties.create_from_tensor(shard.tensor),
                        size=torch.Size(shard.shape),
                    ),
                )
                for index, shard in self._shards.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._shards[MetadataIndex(index.fqn, index.offset)].tensor.detach()


class _ShardLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of shards from whatever shards were saved."""

    def __init__(self, shards: list[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = {_index(shard): shard for shard in shards}

    def create_local_plan(self) -> LoadPlan:
        saved: dict[str, Any] = self.metadata.state_dict_metadata if self.metadata else {}
        return LoadPlan(
            [
                item
                for shard in self._shards.values()
                for item in create_read_items_for_chunk_list(shard.name, saved[shard.name], [_chunk(shard)])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._shards[MetadataIndex(index.fqn, index.offset)].tensor.detach()


def _moment(key: str) -> str:
    """What the names of the moments begin with."""
    return f"optimizer.{key}."


def _state_shards(model: StageModel, optimizer: ZeroAdamW, owned_only: bool) -> Iterator[Shard]:
    """All that a checkpoint holds of this rank: weights under the logical names, moments under prefixed ones."""
    for group in optimizer.groups:
        parts = {"": group.values}
        parts.update({_moment(key): tensor for key, tensor in optimizer.state(group).items()})
        for prefix, flat in parts.items():
            for name, shard in model.flat_shards(group, flat):
                if model.owns(name) or not owned_only:
                    yield replace(shard, name=prefix + shard.name)


def save_checkpoint(
    folder: Path, step: int, model: StageModel, optimizer: ZeroAdamW, description: dict[str, Any]
) -> Path:
    """Writes `folder/step-NNNNNN` for `step` steps taken; every rank calls it. Returns its path.

    description: JSON values kept in state.json beside the step (configuration, model, position in the data).
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    planner = _ShardSavePlanner(list(_state_shards(model, optimizer, owned_only=True)))
    save({}, storage_writer=FileSystemWriter(temporary), planner=planner)
    if dist.get_rank() == 0:
        state = {"format": FORMAT, "step": step, "adam_steps": optimizer.steps, **description}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    dist.barrier()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints, or None."""
    found = {
        int(match[1]): path
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / STATE_FILE).exists()
    }
    return found[max(found)] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of state.json. Raises UserError when unreadable or of another format."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE_FILE}: cannot be read ({error}); give a checkpoint folder") from error
    if state.get("format") != FORMAT:
        raise UserError(f"{checkpoint}: checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def _saved_tensors(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint holds, by name. Raises UserError when its list of contents is damaged."""
    try:
        saved: dict[str, Any] = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(_damaged(checkpoint, f".metadata: {error!r}")) from error
    return saved


def _check_shapes(checkpoint: Path, shards: list[Shard], saved: dict[str, Any]) -> None:
    """Raises UserError unless the checkpoint holds the shards' tensors in their shapes."""
    for shard in shards:
        entry = saved.get(shard.name)
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shard.shape:
            found = f"shape {tuple(entry.size)}" if isinstance(entry, TensorStorageMetadata) else "nothing"
            raise UserError(
                f"{checkpoint}: expected {shard.name} with shape {shard.shape}, found {found}; "
                "it belongs to another model configuration"
            )


def _damaged(checkpoint: Path, what: str) -> str:
    return f"{checkpoint}: damaged ({what}); remove it to go on from an older one"


def _first_cause(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed; the exception itself holds every rank's traceback."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause!r}"


def load_checkpoint(checkpoint: Path, model: StageModel, optimizer: ZeroAdamW) -> tuple[int, list[str]]:
    """Loads weights and optimizer state, saved in any layout; every rank calls it.

    Returns the steps taken, and the trained tensors of the whole model whose moments the checkpoint has not, since
    they were frozen: these start at zero. Raises UserError when the checkpoint is of another model or its files are
    damaged.
    """
    state = read_state(checkpoint)
    saved = _saved_tensors(checkpoint)
    fresh = [name for name in sorted(model.trained_tensors()) if _moment(STATES[0]) + name not in saved]
    absent = {_moment(key) + name for key in STATES for name in fresh}
    shards = [shard for shard in _state_shards(model, optimizer, owned_only=False) if shard.name not in absent]
    _check_shapes(checkpoint, shards, saved)
    try:
        load({}, storage_reader=FileSystemReader(checkpoint), planner=_ShardLoadPlanner(shards))
    except CheckpointException as error:
        raise UserError(_damaged(checkpoint, _first_cause(error))) from error
    step = int(state["step"])
    optimizer.set_step(0 if fresh else int(state.get("adam_steps", step)))
    for group in optimizer.groups:
        group.publish()
    return step, fresh
