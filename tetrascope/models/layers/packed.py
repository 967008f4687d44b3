"""Document borders of a packed sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(frozen=True)
class Packed:
    """The lengths of the documents that lie end to end in a packed sequence.

    A document is whatever attention must not cross: a sample in the decoder, a frame in the vision encoder.
    The lengths are plain Python integers, known before the step from the step plan, so that no layer has to read
    a tensor back from the device to learn a shape.
    """

    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        """Length of the packed sequence in rows."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` as integers: the first row of every document, then the total."""
        return (0, *accumulate(self.lengths))

    def cu_seqlens(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """`cu_seqlens` as an int32 tensor `[documents + 1]`."""
        return torch.tensor(self.offsets, dtype=torch.int32, device=device)

    @cached_property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Documents of equal length, as (number of documents, length), in the row order of `bucket_rows`."""
        counts: dict[int, int] = {}
        for length in self.lengths:
            if length:
                counts[length] = counts.get(length, 0) + 1
        return tuple((counts[length], length) for length in sorted(counts))

    @cached_property
    def bucket_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Row permutation that brings documents of equal length together, and its inverse, int64 `[total]` each.

        None when the documents already lie in that order, as they do when all have one length.
        """
        if list(self.lengths) == sorted(self.lengths):
            return None
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i])
        rows = torch.cat([torch.arange(self.offsets[i], self.offsets[i + 1]) for i in order])
        inverse = torch.empty_like(rows)
        inverse[rows] = torch.arange(len(rows))
        return rows, inverse
