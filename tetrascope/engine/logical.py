"""Which parts of which logical tensors this rank holds.

Logical tensors are the Hugging Face ones: their names and shapes are the same in every layout. A parameter of ours
stacks several of them, tensor parallelism cuts it into blocks, ZeRO cuts a flat run of elements out of that. What is
left are rectangles of logical tensors, each contiguous in local memory. Checkpoints, initialisation, import and
export all work on these rectangles and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tetrascope.models.weights import HFTensor
from tetrascope.parallel.tensor.placement import Block


@dataclass(frozen=True)
class Shard:
    """A rectangle of a logical tensor and the local memory that holds it.

    name, shape: of the whole logical tensor, as a matrix or vector. offset: where the rectangle starts. tensor: a
    view of local memory, of the rectangle's shape.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def shards(
    flat: Tensor,
    start: int,
    local_shape: tuple[int, ...],
    blocks: Sequence[Block],
    pieces: Sequence[HFTensor],
) -> list[Shard]:
    """Cuts a run of a local parameter's elements into shards.

    flat: the elements [start, start + flat.numel()) of the local parameter in row-major order, one-dimensional.
    local_shape: of the local parameter. blocks: its place in the whole one. pieces: the logical tensors stacked in
    the whole one.
    """
    columns = local_shape[1] if len(local_shape) > 1 else 1
    found = []
    for rows, cols in _rectangles(start, start + flat.numel(), columns):
        for block in blocks:
            # Rows of this rectangle in this block, and where they lie in the whole parameter.
            low = max(rows.start, block.local_row)
            high = min(rows.stop, block.local_row + block.size[0])
            shift = block.start[0] - block.local_row
            piece_row = 0
            for piece in pieces:
                first = max(low, piece_row - shift)
                last = min(high, piece_row + piece.matrix[0] - shift)
                if first < last:
                    begin = first * columns + cols.start - start
                    view = flat[begin : begin + (last - first) * len(cols)]
                    row = first + shift - piece_row
                    if len(local_shape) > 1:
                        offset: tuple[int, ...] = (row, block.start[1] + cols.start)
                        view = view.view(last - first, len(cols))
                    else:
                        offset = (row,)
                    found.append(Shard(piece.name, piece.matrix, offset, view))
                piece_row += piece.matrix[0]
    return found


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[range, range]]:
    """Row-major elements [start, stop) as at most three rectangles: a first part row, whole rows, a last part row."""
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows = (stop - start) // columns
            yield range(row, row + rows), range(columns)
            start += rows * columns
        else:
            end = min(stop, (row + 1) * columns)
            yield range(row, row + 1), range(column, column + end - start)
            start = end
