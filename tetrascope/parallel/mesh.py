"""The five axes over one torch DeviceMesh.

Ranks are numbered with tensor parallelism innermost: rank = (((pp·DP + dp)·RING + ring)·ULYSSES + ulysses)·TP + tp,
so that the axes that talk most lie inside a node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tetrascope.errors import UserError

AXES = ("pp", "dp", "ring", "ulysses", "tp")


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes: pipeline, data, ring and Ulysses context parallelism, tensor."""

    pp: int = 1
    dp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank lies on every axis."""
        place = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, place[axis] = divmod(rank, size)
        return place

    def rank(self, place: dict[str, int]) -> int:
        """The rank at the given coordinates."""
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + place[axis]
        return rank

    def __str__(self) -> str:
        parts = [f"{axis.upper()}{size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return "×".join(parts) or "1 rank"


class Mesh:
    """This rank's place in a layout and the process groups it belongs to.

    Needs an initialised default process group of exactly `layout.world` ranks; every rank must build its mesh.
    Raises UserError when the world size differs.
    """

    def __init__(self, layout: Layout, device: str) -> None:
        if dist.get_world_size() != layout.world:
            raise UserError(
                f"parallel: the axes multiply to {layout.world} ranks ({layout}), but {dist.get_world_size()} were "
                "started; change the axes or --nproc-per-node"
            )
        self.layout = layout
        self.device = device
        self.rank = dist.get_rank()
        self.place = layout.coordinates(self.rank)
        self.device_mesh = init_device_mesh(device, layout.sizes, mesh_dim_names=AXES)
        self._data = self._split_by(("dp", "ring", "ulysses"))
        self._context = self._split_by(("ring", "ulysses"))
        # A communicator runs its operations in the order in which they were posted. Two stages that have sent each
        # other something and receive afterwards would wait for each other for ever; so activations and gradients, and
        # each of them up and down the stages, have communicators of their own, in which one side only ever sends.
        self._channels = {
            (forward, rising): self._split_by(("pp",)) for forward in (True, False) for rising in (True, False)
        }
        self._ends = self._group_of(
            [[layout.rank({**p, "pp": stage}) for stage in sorted({0, layout.pp - 1})] for p in self._others("pp")]
        )

    def _others(self, *axes: str) -> list[dict[str, int]]:
        """The coordinates of all ranks that are at 0 on the given axes."""
        places = [self.layout.coordinates(rank) for rank in range(self.layout.world)]
        return [place for place in places if all(place[axis] == 0 for axis in axes)]

    def _split_by(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        """The group of ranks that differ from this one on the given axes only."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.layout.world):
            place = self.layout.coordinates(rank)
            groups.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
        return self._group_of(list(groups.values()))

    def _group_of(self, groups: Sequence[list[int]]) -> dist.ProcessGroup:
        """This rank's group among disjoint ones; a group of one for a rank that is in none."""
        members = {rank for group in groups for rank in group}
        singles = [[rank] for rank in range(self.layout.world) if rank not in members]
        group, _ = dist.new_subgroups_by_enumeration([*groups, *singles])
        return group

    def size(self, axis: str) -> int:
        """Number of ranks on an axis."""
        return dict(zip(AXES, self.layout.sizes, strict=True))[axis]

    def index(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        return self.place[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on `axis` only."""
        return self.device_mesh.get_group(axis)

    @property
    def data(self) -> dist.ProcessGroup:
        """The ranks that hold the same parameters and see other tokens: dp × ring × ulysses."""
        return self._data

    @property
    def context(self) -> dist.ProcessGroup:
        """The ranks that hold parts of one micro-batch: ring × ulysses."""
        return self._context

    def channel(self, forward: bool, rising: bool) -> dist.ProcessGroup:
        """The pipeline axis for transfers of one kind: activations or their gradients, to later or to earlier stages.

        Where every stage has one chunk of the model, activations rise and gradients fall; with several, both do both.
        """
        return self._channels[forward, rising]

    def stage_rank(self, stage: int) -> int:
        """The global rank of this rank's counterpart on another stage."""
        return self.layout.rank({**self.place, "pp": stage})

    @property
    def pipeline_ends(self) -> dist.ProcessGroup:
        """First and last stage, for embeddings tied across them."""
        return self._ends

    @property
    def first_stage(self) -> bool:
        return self.index("pp") == 0

    @property
    def last_stage(self) -> bool:
        return self.index("pp") == self.layout.pp - 1
