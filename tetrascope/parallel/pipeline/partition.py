"""Which decoder layers each chunk of the pipeline holds: by counting their cost, and by trying.

Chunks are counted without the vision encoder where that is one of its own: stages times virtual stages. Every one
holds a decoder layer at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, permutations

from tetrascope.errors import UserError


def balanced_split(layers: int, chunks: int, first_extra: float, last_extra: float, first_least: int = 1) -> list[int]:
    """Layers per chunk that minimise the heaviest chunk, in units of one layer's cost.

    first_extra: cost of vision encoder and adaptor in chunk 0; last_extra: cost of the output head in the last.
    first_least: layers that chunk 0 gets at least. Every other chunk gets at least one; among equally good splits, the
    one whose chunks are most alike (smallest sum of squares). Raises UserError when there are too few layers.
    """
    check_layers(layers, chunks, first_least)

    @cache
    def best(chunk: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Heaviest chunk, sum of squares and layer counts for chunks `chunk` … with `left` layers to give out."""
        extra = (first_extra if chunk == 0 else 0.0) + (last_extra if chunk == chunks - 1 else 0.0)
        if chunk == chunks - 1:
            return left + extra, (left + extra) ** 2, (left,)
        options = []
        for count in range(first_least if chunk == 0 else 1, left - (chunks - 1 - chunk) + 1):
            peak, squares, rest = best(chunk + 1, left - count)
            options.append((max(count + extra, peak), squares + (count + extra) ** 2, (count, *rest)))
        return min(options)

    return list(best(0, layers)[2])


def search_split(
    start: Sequence[int],
    seconds: Callable[[tuple[int, ...]], float],
    least: Sequence[int] | None = None,
    tries: int | None = None,
) -> list[int]:
    """Layers per chunk of the fewest seconds that can be had from `start` by moving layers between chunks.

    seconds: of a split, say the makespan of its schedule; asked once for every split, and for `tries` of them at most.
    least: layers that each chunk keeps; 1 where it is None. One layer, or two, go from any chunk to any other; what is
    faster by more than rounding is gone on from, till no move is. The result is never slower than `start`, which must
    have what `least` asks for.
    """
    keep = tuple(least) if least is not None else (1,) * len(start)
    known = {tuple(start): seconds(tuple(start))}
    best = tuple(start)
    moves = [(count, *pair) for count in (1, 2) for pair in permutations(range(len(best)), 2)]
    since = 0
    for count, source, target in cycle(moves):
        if since == len(moves) or (tries is not None and len(known) >= tries):
            break
        since += 1
        split = tuple(n + count * ((c == target) - (c == source)) for c, n in enumerate(best))
        if split[source] < keep[source]:
            continue
        if split not in known:
            known[split] = seconds(split)
        if known[split] < known[best] * (1 - 1e-9):
            best, since = split, 0
    return list(best)


def check_layers(layers: int, chunks: int, first_least: int = 1) -> None:
    """Raises UserError when there are too few decoder layers: one for each chunk, `first_least` for the first."""
    needed = first_least + chunks - 1
    if layers < needed:
        why = f", since the first must hold {first_least}" if first_least > 1 else ""
        raise UserError(
            f"parallel.pp: {chunks} chunks (stages times virtual stages) need at least {needed} decoder layers, the "
            f"model has {layers}{why}; lower parallel.pp or parallel.virtual_stages, so that they multiply to "
            f"{layers - first_least + 1} or less"
        )


def check_split(split: Sequence[int], layers: int, chunks: int, first_least: int = 1) -> None:
    """Raises UserError unless `split` has a layer for every one of `chunks`, `first_least` for the first, and `layers`
    in total."""
    check_layers(layers, chunks, first_least)
    expected = f"expected {chunks} numbers (stages times virtual stages) of at least 1 that add up to {layers} layers"
    if len(split) != chunks:
        raise UserError(f"parallel.split: {list(split)} has {len(split)} numbers; {expected}")
    if min(split) < 1:
        raise UserError(f"parallel.split: {list(split)} leaves chunk {_emptiest(split)} without a layer; {expected}")
    if sum(split) != layers:
        raise UserError(f"parallel.split: {list(split)} adds up to {sum(split)}; {expected}")
    if split[0] < first_least:
        raise UserError(
            f"parallel.split: {list(split)} gives the first chunk {split[0]} layers, this model needs at least "
            f"{first_least} there; raise the first number"
        )


def _emptiest(split: Sequence[int]) -> int:
    return min(range(len(split)), key=lambda chunk: split[chunk])
