"""The contents of an output file, read ahead in threads while the file is written.

Tensors are read in chunks of some rows, in the order in which they are written. A fixed number of chunks is on its way
at any time, so that memory does not depend on the size of anything.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tetrascope.models.weights import Piece
from tetrascope.tools.checkpoint_convert.formats import Output, Reader, Target

CHUNK_BYTES = 16 << 20
"""Bytes that are read at once, unless a single row has more."""

THREADS = 4
"""Chunks that are read at the same time; twice as many are on their way."""

Progress = Callable[[int], None]
"""Called with numbers of bytes as they are done."""


def row_ranges(pieces: Sequence[Piece], itemsize: int) -> Iterator[Piece]:
    """Pieces cut into ones of at most CHUNK_BYTES, of rows of numbers of that size."""
    for piece in pieces:
        row = math.prod(piece.tensor.matrix[1:]) * itemsize
        step = max(1, CHUNK_BYTES // max(1, row))
        for start in range(piece.start, piece.start + piece.rows, step):
            yield Piece(piece.tensor, start, min(step, piece.start + piece.rows - start))


class RowStream:
    """`Rows` of one output. Targets are asked for in the output's order, each once, by one thread."""

    def __init__(self, output: Output, reader: Reader, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self._reader, self._pool, self._progress = reader, pool, progress
        self._jobs = ((target, piece) for target in output.targets for piece in self._pieces(target))
        self._ahead: deque[tuple[Target, Future[Tensor]]] = deque()

    def _pieces(self, target: Target) -> Iterator[Piece]:
        return row_ranges(target.pieces, target.dtype.itemsize)

    def _read(self, target: Target, piece: Piece) -> Tensor:
        rows = self._reader.read(piece.tensor.name, piece.start, piece.rows)
        if target.columns is not None:
            rows = rows[:, target.columns.start : target.columns.stop]
        return rows.to(target.dtype).contiguous()

    def _next(self) -> tuple[Target, Tensor]:
        while len(self._ahead) < 2 * THREADS and (job := next(self._jobs, None)) is not None:
            self._ahead.append((job[0], self._pool.submit(self._read, *job)))
        target, future = self._ahead.popleft()
        return target, future.result()

    def chunks(self, target: Target) -> Iterator[Tensor]:
        """A target's rows, top to bottom, in its dtype: `[rows, columns]` or `[rows]`, contiguous."""
        for _ in self._pieces(target):
            found, chunk = self._next()
            if found is not target:
                raise ValueError(f"{found.name} comes before {target.name}")
            self._progress(chunk.nbytes)
            yield chunk

    def whole(self, target: Target) -> Tensor:
        """All of a target in its dtype and shape, in memory of its own."""
        found = torch.empty(target.shape, dtype=target.dtype)
        flat, done = found.view(-1), 0
        for chunk in self.chunks(target):
            flat[done : done + chunk.numel()] = chunk.view(-1)
            done += chunk.numel()
        return found

    def close(self) -> None:
        """Waits for what is on its way, after an error."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
