"""How keys, values and gradients move between ranks, and how many bytes do.

Bytes are those that a rank sends: all but its own share of an all-to-all; R - 1 times its part in a gather, which the
usual algorithms pass on that often, and as much in a reduce-scatter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.primitives import all_gather, reduce_scatter

Arrival = Callable[[], Tensor]
"""Waits for a transfer and returns what came."""


class Links:
    """A process group of context parallelism. `sent`: bytes that this rank has sent, by kind of transfer."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self.sent: Counter[str] = Counter()

    def pass_on(self, x: Tensor, kind: str) -> Arrival:
        """Sends x to the next rank of the ring and receives as much from the one before, without waiting.

        x must not be written to before the arrival has been waited for. Both directions are posted as one batch, so
        that NCCL can make them one kernel; all ranks of the ring must pass on in the same order.
        """
        arriving = torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self.group, group_peer=(self.rank + 1) % self.size),
                dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=(self.rank - 1) % self.size),
            ]
        )
        self.sent[kind] += x.nbytes

        def wait(sent: Tensor = x) -> Tensor:  # `sent` lives until it is sent
            for work in works:
                work.wait()
            return arriving

        return wait

    def exchange(self, x: Tensor, kind: str) -> Tensor:
        """x `[size, ...]`: slice i goes to rank i; slice i of the result came from there."""
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        self.sent[kind] += x.nbytes // self.size * (self.size - 1)
        return out

    def gather(self, x: Tensor, kind: str) -> Arrival:
        """`[...]` -> `[size, ...]`, the ranks' x in rank order, without waiting."""
        out = x.new_empty((self.size, *x.shape))
        work = all_gather(out.flatten(0, 1), x, self.group, async_op=True)
        self.sent[kind] += x.nbytes * (self.size - 1)

        def wait(sent: Tensor = x) -> Tensor:  # `sent` lives until it is sent
            if work is not None:
                work.wait()
            return out

        return wait

    def reduce_scatter(self, x: Tensor, kind: str) -> Tensor:
        """`[size, ...]` -> `[...]`: the sum over the ranks of their slices for this one."""
        out = x.new_empty(x.shape[1:])
        reduce_scatter(out, x.flatten(0, 1), self.group)
        self.sent[kind] += out.nbytes * (self.size - 1)
        return out
