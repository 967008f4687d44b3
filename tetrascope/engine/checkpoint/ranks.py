"""What the ranks that save or load a checkpoint together tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class Ranks:
    """All ranks of the run, over a process group that can carry Python objects; None: this process alone.

    Collectives of two threads on one group would mix: what saves in the background needs a group of its own.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @staticmethod
    def default() -> Ranks:
        """Over the default process group, where there is one."""
        return Ranks(dist.group.WORLD if dist.is_initialized() else None)

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Value] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, work: Callable[[], Value]) -> Value:
        """Does something on rank 0; its result, or the exception that it raised, on every rank."""
        outcome: list[tuple[Value | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                outcome = [(work(), None)]
            except Exception as error:
                outcome = [(None, error)]
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        value, failure = outcome[0]
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]
