"""Which parts of which logical tensors this rank holds.

Logical tensors are the Hugging Face ones: their names and shapes are the same in every layout. A parameter of ours
stacks row ranges of them, tensor parallelism cuts it into blocks, ZeRO cuts a flat run of elements out of that. What is
left are rectangles of logical tensors, each contiguous in local memory. Checkpoints, initialisation, import and
export all work on these rectangles and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tetrascope.models.weights import Piece, cut_rows
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
    pieces: Sequence[Piece],
) -> list[Shard]:
    """Cuts a run of a local parameter's elements into shards.

    flat: the elements [start, start + flat.numel()) of the local parameter in row-major order, one-dimensional.
    local_shape: of the local parameter. blocks: its place in the whole one. pieces: the rows of logical tensors
    stacked in the whole one.
    """
    columns = local_shape[1] if len(local_shape) > 1 else 1
    found = []
    for rows, cols in _rectangles(start, start + flat.numel(), columns):
        for block in blocks:
            # Rows of this rectangle in this block, and where they lie in the whole parameter.
            low = max(rows.start, block.local_row)
            high = min(rows.stop, block.local_row + block.size[0])
            shift = block.start[0] - block.local_row
            for row, piece in cut_rows(pieces, low + shift, high - low):
                begin = (row - shift) * columns + cols.start - start
                view = flat[begin : begin + piece.rows * len(cols)]
                offset: tuple[int, ...] = (piece.start,)
                if len(local_shape) > 1:
                    offset = (piece.start, block.start[1] + cols.start)
                    view = view.view(piece.rows, len(cols))
                found.append(Shard(piece.tensor.name, piece.tensor.matrix, offset, view))
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
