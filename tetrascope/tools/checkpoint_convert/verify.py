"""Whether a written checkpoint holds what its source does, bit by bit, read back as anyone would read it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from tetrascope.errors import UserError
from tetrascope.models.weights import Piece
from tetrascope.tools.checkpoint_convert.formats import DTYPES, Options, Reader
from tetrascope.tools.checkpoint_convert.stream import THREADS, Progress, row_ranges


def verify_tensors(
    source: Reader,
    written: Reader,
    names: Iterable[str],
    options: Options,
    pool: ThreadPoolExecutor,
    done: Progress,
) -> int:
    """Compares the logical tensors that were to be written; returns how many.

    Where another dtype was asked for, the source's numbers in that dtype are what must be found. Raises UserError that
    names the first tensor that is missing or differs.
    """
    if written.config != source.config:
        raise UserError(f"{written.path}: describes another model than {source.path}; this is a defect of the program")
    ahead: deque[tuple[str, Future[bool]]] = deque()
    wanted = sorted(names)
    for name in wanted:
        tensor = source.tensors[name]
        if name not in written.tensors:
            raise UserError(f"{written.path}: lacks {name}, which {source.path} has")
        for piece in row_ranges([Piece(tensor, 0, tensor.matrix[0])], written.dtype(name).itemsize):
            ahead.append((name, pool.submit(_same, source, written, piece, options)))
            if len(ahead) > 2 * THREADS:
                _expect(*ahead.popleft(), written)
        done(written.dtype(name).itemsize * torch.Size(tensor.matrix).numel())
    for pair in ahead:
        _expect(*pair, written)
    return len(wanted)


def _expect(name: str, same: Future[bool], written: Reader) -> None:
    if not same.result():
        raise UserError(f"{written.path}: {name} is not what the source holds; convert again, and check the storage")


def _same(source: Reader, written: Reader, piece: Piece, options: Options) -> bool:
    place = (piece.tensor.name, piece.start, piece.rows)
    wanted, found = source.read(*place), written.read(*place)
    if options.dtype is not None:
        wanted = wanted.to(DTYPES[options.dtype])
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    same_kind = wanted.dtype == found.dtype and wanted.shape == found.shape
    kind = bits[wanted.dtype.itemsize]
    return same_kind and torch.equal(wanted.contiguous().view(kind), found.contiguous().view(kind))
