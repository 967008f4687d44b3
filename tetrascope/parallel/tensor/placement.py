"""Where the parts of a divided parameter lie in the whole one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A rectangle of the whole parameter, held in consecutive rows of the local one (all of its columns).

    local_row: its first row in the local parameter. start, size: its place and extent in the whole parameter,
    (rows, columns) for a matrix, (rows,) for a vector.
    """

    local_row: int
    start: tuple[int, ...]
    size: tuple[int, ...]


def share(total: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` contiguous shares of `total`; the first total % parts are one longer."""
    quotient, rest = divmod(total, parts)
    start = index * quotient + min(index, rest)
    return range(start, start + quotient + (index < rest))


def whole(shape: tuple[int, ...]) -> tuple[Block, ...]:
    """The one block of an undivided parameter."""
    return (Block(0, (0,) * len(shape), shape),)


def row_blocks(segments: tuple[int, ...], tail: tuple[int, ...], parts: int, index: int) -> tuple[Block, ...]:
    """Blocks of a parameter whose fused row segments are each divided over `parts`; `tail`: its other extents."""
    blocks, local_row, segment_start = [], 0, 0
    for rows in segments:
        mine = share(rows, parts, index)
        blocks.append(Block(local_row, (segment_start + mine.start, *(0 for _ in tail)), (len(mine), *tail)))
        local_row += len(mine)
        segment_start += rows
    return tuple(blocks)
