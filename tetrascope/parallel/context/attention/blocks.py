"""Rectangles of attention that one kernel call can do together, with the index tensors that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tetrascope.parallel.context.tokens import Block


class Rows:
    """Some rows of a tensor, given as (start, count) ranges that do not overlap, in the order of the ranges.

    Where they lie end to end, they are taken as a view and no index is made. An index is sent to a device once.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = tuple((start, count) for start, count in ranges if count)
        self.count = sum(count for _, count in self.ranges)
        self.start = self.ranges[0][0] if self.ranges else 0
        ends = [start + count for start, count in self.ranges]
        self.contiguous = all(start == end for (start, _), end in zip(self.ranges[1:], ends, strict=False))
        self._index: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor:
        """The row numbers, int64 `[count]`."""
        if device not in self._index:
            ranges = [torch.arange(start, start + count) for start, count in self.ranges]
            self._index[device] = torch.cat([torch.zeros(0, dtype=torch.int64), *ranges]).to(device)
        return self._index[device]

    def covers(self, rows: int) -> bool:
        """Whether these are all rows of a tensor of `rows`, in order."""
        return self.contiguous and self.start == 0 and self.count == rows

    def take(self, x: Tensor) -> Tensor:
        """These rows of x; a view where they lie end to end."""
        if self.contiguous:
            return x[self.start : self.start + self.count]
        return x.index_select(0, self.index(x.device))

    def put(self, x: Tensor, values: Tensor) -> None:
        """Overwrites these rows of x."""
        if self.contiguous:
            x[self.start : self.start + self.count] = values
        else:
            x.index_copy_(0, self.index(x.device), values)

    def add(self, x: Tensor, values: Tensor) -> None:
        """Adds to these rows of x, in the precision of x."""
        if self.contiguous:
            x[self.start : self.start + self.count] += values
        else:
            x.index_add_(0, self.index(x.device), values.to(x.dtype))


@dataclass(frozen=True, eq=False)
class BlockSet:
    """Blocks that share no row of q and no row of k, all of them causal squares or all of them full rectangles.

    `q` and `k` are their rows, block after block: what a kernel for packed sequences calls its sequences.
    """

    blocks: tuple[Block, ...]
    causal: bool

    @cached_property
    def q(self) -> Rows:
        return Rows([(block.q_start, block.q_rows) for block in self.blocks])

    @cached_property
    def k(self) -> Rows:
        return Rows([(block.k_start, block.k_rows) for block in self.blocks])

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Rows of q and of k of the largest blocks."""
        return max(block.q_rows for block in self.blocks), max(block.k_rows for block in self.blocks)

    @cached_property
    def _cu_seqlens(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def prepare(self, device: torch.device) -> None:
        """Makes the tensors that kernels, merging and sums will need on a device."""
        for rows in (self.q, self.k):
            if not rows.contiguous:
                rows.index(device)
        self.cu_seqlens(device)

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Borders of the blocks in `q` and in `k`, int32 `[blocks + 1]` each; made once for a device."""
        if device not in self._cu_seqlens:
            lengths = [[b.q_rows for b in self.blocks], [b.k_rows for b in self.blocks]]
            q, k = (torch.tensor([0, *accumulate(rows)], dtype=torch.int32).to(device) for rows in lengths)
            self._cu_seqlens[device] = (q, k)
        return self._cu_seqlens[device]


def one_set(blocks: Sequence[Block]) -> tuple[BlockSet, ...]:
    """The blocks as one set, or no set where there are none. They must share neither rows nor differ in `causal`."""
    return (BlockSet(tuple(blocks), blocks[0].causal),) if blocks else ()
