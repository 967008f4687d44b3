"""The two collectives over flat tensors, under the names that the installed torch prefers for them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
    """Fills `out` with every rank's `own`, in rank order along dimension 0. async_op: returns what to wait for."""
    work: dist.Work | None = _gather(out, own, group=group, async_op=async_op)
    return work


def reduce_scatter(out: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """Fills `out` with this rank's part, along dimension 0, of the sum of all ranks' `whole`."""
    _scatter(out, whole, group=group)
