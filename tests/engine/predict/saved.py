"""Counting what autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def saved_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Bytes of the storages that a forward saves for its backward, each once, without those of `given` tensors."""
    others = {tensor.untyped_storage()._cdata for tensor in given}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in others:
            found[storage._cdata] = tensor  # kept, so that no later storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@contextmanager
def pretended_ranks(world: int, rank: int = 0) -> Iterator[None]:
    """A process group of one rank that only pretends to have the others; its collectives leave results as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
