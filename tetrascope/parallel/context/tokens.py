"""Token sharding: which rows of a packed micro-batch lie on which context-parallel rank, and who attends to whom.

Every document is cut for itself. Ring rank r of R holds chunks r and 2R-1-r of the 2R chunks of a document (zigzag:
under a causal mask all ranks then have the same work), or the whole of it. Its rows, document after document, are cut
into U contiguous parts for the ranks of its Ulysses group, each of which is divided by sequence parallelism in turn.

Chunks need not be equally long, since all that differs is said in `Block`s: no document is padded, only the pack.

Sources: the zigzag is that of ring-flash-attention (zigzag_ring_flash_attn.py), made per document and unequal; Ulysses
inside, ring outside is USP (Fang & Zhao 2024, arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tetrascope.errors import UserError
from tetrascope.parallel.context.shares import ring_shares

USEFUL_CHUNK = 128
"""Rows that a kernel's tile takes: documents whose chunks would be shorter are kept whole if balance allows it."""


class Block(NamedTuple):
    """A rectangle of attention: rows of q with rows of the k and v at hand.

    causal: q row i sees k rows j ≤ i + k_rows - q_rows (bottom right); else all of them. Never empty.
    """

    q_start: int
    q_rows: int
    k_start: int
    k_rows: int
    causal: bool


class Piece(NamedTuple):
    """What a ring rank holds of a document: two ranges of the packed rows, side by side among its own rows.

    document: its number; that of the padding is the number of documents. row: first of its own rows.
    first, second: rows of the two chunks. first_start, second_start: where they begin in the pack.
    """

    document: int
    row: int
    first_start: int
    first: int
    second_start: int
    second: int

    @property
    def rows(self) -> int:
        return self.first + self.second


@dataclass(frozen=True, eq=False)
class TokenSharding:
    """Where the rows of a pack lie. Made by `shard_tokens`; equal only to itself, so that plans can be kept by it.

    lengths: rows of the documents. shares: int64 `[ring, documents + 1]`, rows of each on each ring rank, the last
    column padding. Context-parallel rank c = ring index · ulysses + Ulysses index, as in the mesh.
    """

    lengths: tuple[int, ...]
    ring: int
    ulysses: int
    tp: int
    shares_RD: np.ndarray

    @property
    def total(self) -> int:
        """Rows of the pack with its padding, which comes last."""
        return self.ring * self.ring_rows

    @property
    def padding(self) -> int:
        """Rows of the pack that belong to no document."""
        return self.total - sum(self.lengths)

    @cached_property
    def ring_rows(self) -> int:
        """Rows of every ring rank: those of all ranks of its Ulysses group."""
        return int(self.shares_RD[0].sum())

    @property
    def rank_rows(self) -> int:
        """Rows of every context-parallel rank; tensor parallelism divides them into `tp` contiguous parts."""
        return self.ring_rows // self.ulysses

    @property
    def balance(self) -> float:
        """Attention work of the busiest ring rank over the mean, in pairs of attending rows."""
        pairs = [sum(map(_pairs, self.gathered_blocks(rank))) for rank in range(self.ring)]
        own = [p * (p + 1) // 2 for p in self.shares_RD[:, -1].tolist()]  # padding is not work anyone asked for
        work = [a - b for a, b in zip(pairs, own, strict=True)]
        return max(work) * self.ring / sum(work) if sum(work) else 1.0

    @cached_property
    def order(self) -> np.ndarray:
        """The row of the pack that lies at each place, rank after rank, int64 `[total]`."""
        ranges = [
            np.arange(start, start + rows)
            for pieces in self.pieces
            for p in pieces
            for start, rows in ((p.first_start, p.first), (p.second_start, p.second))
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *ranges])

    @cached_property
    def inverse(self) -> np.ndarray:
        """The place of each row of the pack, int64 `[total]`: order[inverse] counts up."""
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(self.total)
        return inverse

    def rows_of(self, rank: int) -> np.ndarray:
        """The rows of the pack on a context-parallel rank, int64 `[rank_rows]`; those ≥ sum(lengths) are padding."""
        return self.order[rank * self.rank_rows : (rank + 1) * self.rank_rows]

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """What every ring rank holds, in the order of its rows."""
        offsets = [0, *accumulate(self.lengths)]
        lengths = [*self.lengths, self.padding]
        # Odd shares have one row more in the first chunk or in the second, by turns.
        first_RD = (self.shares_RD + np.indices(self.shares_RD.shape).sum(0) % 2) // 2
        first_RD[:, -1] = self.shares_RD[:, -1]  # padding is no document: nothing to mirror
        second_RD = self.shares_RD - first_RD
        before_RD, after_RD = np.cumsum(first_RD, 0) - first_RD, np.cumsum(second_RD, 0)
        found = []
        for first_D, second_D, before_D, after_D in zip(
            first_RD.tolist(), second_RD.tolist(), before_RD.tolist(), after_RD.tolist(), strict=True
        ):
            own, row = [], 0
            for d, (first, second) in enumerate(zip(first_D, second_D, strict=True)):
                if first + second:
                    end = offsets[d] + lengths[d]
                    own.append(Piece(d, row, offsets[d] + before_D[d], first, end - after_D[d], second))
                    row += first + second
            found.append(tuple(own))
        return tuple(found)

    def local_lengths(self, rank: int) -> tuple[int, ...]:
        """Lengths of the pieces on a ring rank, end to end in the order of its rows."""
        return tuple(piece.rows for piece in self.pieces[rank])

    def ring_blocks(self, rank: int, causal: bool = True) -> tuple[tuple[Block, ...], ...]:
        """What a ring rank computes in each step of the ring, with the k and v of ring rank (rank - step) % ring."""
        return tuple(self._step(rank, step, causal) for step in range(self.ring))

    def _step(self, rank: int, step: int, causal: bool) -> tuple[Block, ...]:
        if step == 0:
            return tuple(Block(p.row, p.rows, p.row, p.rows, causal) for p in self.pieces[rank])
        other = (rank - step) % self.ring
        theirs = {piece.document: piece for piece in self.pieces[other]}
        blocks = []
        for q in self.pieces[rank]:
            k = theirs.get(q.document)
            if k is None or q.document == len(self.lengths):
                continue
            if not causal:
                block = Block(q.row, q.rows, k.row, k.rows, False)
            elif other < rank:  # their first chunk is before all of q, their second after it
                block = Block(q.row, q.rows, k.row, k.first, False)
            else:  # both of their chunks are between the two of q
                block = Block(q.row + q.first, q.second, k.row, k.rows, False)
            if block.q_rows and block.k_rows:
                blocks.append(block)
        return tuple(blocks)

    def gathered_blocks(self, rank: int, causal: bool = True) -> tuple[Block, ...]:
        """What a ring rank computes with the k and v of all ranks, brought into the order of the pack."""
        offsets = [0, *accumulate(self.lengths)]
        blocks = []
        for p in self.pieces[rank]:
            if p.document == len(self.lengths):
                blocks.append(Block(p.row, p.rows, p.first_start, p.rows, causal))
                continue
            start, length = offsets[p.document], self.lengths[p.document]
            if not causal:
                blocks.append(Block(p.row, p.rows, start, length, False))
                continue
            second_end = p.second_start + p.second - start
            if p.first_start + p.first == p.second_start:  # one range: all of a document, or its middle
                blocks.append(Block(p.row, p.rows, start, second_end, True))
                continue
            if p.first:
                blocks.append(Block(p.row, p.first, start, p.first_start + p.first - start, True))
            if p.second:
                blocks.append(Block(p.row + p.first, p.second, start, second_end, True))
        return tuple(blocks)


def shard_tokens(
    lengths: Sequence[int],
    ring: int,
    ulysses: int,
    tp: int = 1,
    rows: int | None = None,
    chunk: int = USEFUL_CHUNK,
    row_pairs: float = 0.0,
) -> TokenSharding:
    """Divides a pack over ring · ulysses ranks, each with the same number of rows, a multiple of tp.

    lengths: rows of the documents, in packed order. rows: rows of the pack with the padding at its end (None: no
    padding); more is added where rows do not divide by ring · ulysses · tp. chunk: documents of less than
    2 · ring · chunk rows stay whole on a ring rank where attention balance allows it (0: all are cut). row_pairs: work
    per row besides attention, in pairs of attending rows, that balance may count on (0: attention alone).

    Attention work of the ranks is balanced to rounding (`TokenSharding.balance`) unless the documents have hardly more
    rows than there are ranks: n rows cannot be divided better than ⌈n / ring⌉ to n / ring. Raises UserError when
    `rows` are too few, ValueError for degrees below 1 and documents without rows.
    """
    if min(ring, ulysses, tp) < 1 or chunk < 0 or min(lengths, default=1) < 1:
        raise ValueError(f"{ring=}, {ulysses=}, {tp=}, {chunk=}: degrees and documents must be at least 1, chunk 0")
    used = sum(lengths)
    if rows is not None and rows < used:
        raise UserError(
            f"context parallelism: documents of {used} rows in a pack of {rows}; "
            f"raise the rows of a pack to {used} at least, or put fewer documents into it"
        )
    unit = ring * ulysses * tp
    total = -(-max(used, rows or 0) // unit) * unit
    return TokenSharding(tuple(lengths), ring, ulysses, tp, ring_shares(lengths, ring, total // ring, chunk, row_pairs))


def _pairs(block: Block) -> int:
    """Pairs of attending rows in a causal block."""
    return block.q_rows * block.k_rows - block.q_rows * (block.q_rows - 1) // 2
