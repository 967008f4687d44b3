"""The shards that a checkpoint holds of this rank, and torch's plans for writing and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tetrascope.engine.build import StageModel
from tetrascope.engine.logical import Shard
from tetrascope.parallel.zero.flat import FlatGroup
from tetrascope.parallel.zero.optimizer import ZeroAdamW

Copy = Callable[[str, FlatGroup, Tensor], Tensor]
"""(name prefix, group, this rank's share of its values or of a moment) -> the memory to save it from."""


def live(prefix: str, group: FlatGroup, flat: Tensor) -> Tensor:
    """The memory itself: for a save that the run waits for."""
    return flat


def moment(key: str) -> str:
    """What the names of the moments begin with."""
    return f"optimizer.{key}."


def state_shards(model: StageModel, optimizer: ZeroAdamW, owned_only: bool, copy: Copy = live) -> Iterator[Shard]:
    """All that a checkpoint holds of this rank: weights under the logical names, moments under prefixed ones.

    owned_only: of what several ranks hold, only what this one saves. What is copied, is copied before this returns;
    the shards are found as they are asked for, which another thread may do.
    """
    flats = []
    for group in optimizer.groups:
        if owned_only and not any(model.owns(name) for name in group.spans):
            continue
        flats.append(("", group, copy("", group, group.values)))
        for key, tensor in optimizer.state(group).items():
            flats.append((moment(key), group, copy(moment(key), group, tensor)))
    return _found(flats, model, owned_only)


def _found(flats: list[tuple[str, FlatGroup, Tensor]], model: StageModel, owned_only: bool) -> Iterator[Shard]:
    for prefix, group, flat in flats:
        for name, shard in model.flat_shards(group, flat):
            if model.owns(name) or not owned_only:
                yield replace(shard, name=prefix + shard.name)


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(shard.offset), sizes=shard.tensor.shape)


def _index(shard: Shard) -> MetadataIndex:
    return MetadataIndex(shard.name, torch.Size(shard.offset))


class ShardSavePlanner(DefaultSavePlanner):
    """Plans the writing of shards; torch's default planner then checks that they cover every tensor exactly once."""

    def __init__(self, shards: Iterable[Shard]) -> None:
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


class ShardLoadPlanner(DefaultLoadPlanner):
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
