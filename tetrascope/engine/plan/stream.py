"""The endless order of samples of a mixture of sources: any place in it is computed without the places before it.

Positions come in blocks of `BLOCK`. In every block a source has the same whole number of places, its weight rounded,
and the places of a block are shuffled. The places of a source, in order, go through it epoch by epoch, each epoch in
an order of its own: every sample exactly once an epoch. With a single source that is its plain order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from tetrascope.errors import UserError

BLOCK = 4096
"""Positions in which the shares of the sources come out exactly."""


@dataclass(frozen=True)
class Source:
    """A data set of a mixture. weight: its share of the samples drawn, relative to the others. shuffle: anew in every
    epoch; False goes through it in its own order. blocks: ends of runs of samples that are read together (a shard of
    tar files, a row group); they are shuffled, and the samples inside each, but no sample leaves its run. None: all
    samples are shuffled alike."""

    name: str
    length: int
    weight: float = 1.0
    shuffle: bool = True
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Draw:
    """What lies at a position: a sample of a source (numbers from 0), and how often the source was gone through
    before."""

    position: int
    source: int
    sample: int
    epoch: int


class Stream:
    """Draws by position.

    Raises UserError for a weight that is negative or no number, a source that is empty, more sources than places in
    a block, and when nothing has a weight.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self._seed = tuple(sources), seed
        self.places = places_per_block(self.sources)
        self._block = lru_cache(maxsize=8)(self._shuffled_block)
        # A cache for each source: small ones that are gone through quickly must not push out the order of a large one.
        self._orders = [lru_cache(maxsize=2)(partial(self._order, number)) for number in range(len(self.sources))]

    def __getitem__(self, position: int) -> Draw:
        """What lies at a position, counted from 0."""
        block, place = divmod(position, BLOCK)
        sources, ranks = self._block(block)
        number = sources[place]
        epoch, index = divmod(block * self.places[number] + ranks[place], self.sources[number].length)
        sample = int(self._orders[number](epoch)[index]) if self.sources[number].shuffle else index
        return Draw(position, number, sample, epoch)

    def epochs(self, position: int) -> tuple[float, ...]:
        """How often each source has been gone through by the positions before this one."""
        block, place = divmod(position, BLOCK)
        before = [block * places for places in self.places]
        for number in self._block(block)[0][:place] if place else ():
            before[number] += 1
        return tuple(n / source.length if n else 0.0 for n, source in zip(before, self.sources, strict=True))

    def _shuffled_block(self, block: int) -> tuple[list[int], list[int]]:
        """Of every place in a block, its source, and how many places of that source come before it."""
        sources = np.repeat(np.arange(len(self.sources)), self.places)
        if np.count_nonzero(self.places) > 1:
            # The last word of the counter keeps these numbers apart from those of the epochs' orders.
            np.random.Generator(np.random.Philox(key=[self._seed, block], counter=[0, 0, 0, 1])).shuffle(sources)
        ranks = np.empty(BLOCK, dtype=np.int64)
        for number, places in enumerate(self.places):
            ranks[sources == number] = np.arange(places)
        return sources.tolist(), ranks.tolist()

    def _order(self, number: int, epoch: int) -> np.ndarray:
        """The order of a source in an epoch."""
        length = self.sources[number].length
        kind = np.int32 if length < 2**31 else np.int64  # half the memory where it does
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=[0, 0, number, 0]))
        ends = self.sources[number].blocks
        if ends is None:
            return generator.permutation(np.arange(length, dtype=kind))
        runs = np.split(np.arange(length, dtype=kind), ends[:-1])
        return np.concatenate([generator.permutation(runs[run]) for run in generator.permutation(len(runs))])


def places_per_block(sources: Sequence[Source]) -> tuple[int, ...]:
    """How many of the `BLOCK` places each source has: its share rounded by largest remainder, but at least one.

    Raises UserError as `Stream` does.
    """
    for source in sources:
        if not 0 <= source.weight < float("inf"):
            raise UserError(f"source {source.name}: weight {source.weight} must be zero or a positive number")
        if source.weight and not source.length:
            raise UserError(f"source {source.name}: holds no samples; remove it or set its weight to 0")
    total = sum(source.weight for source in sources)
    if not total:
        raise UserError("sources: no source has a weight above 0; give one to at least one of them")
    if sum(source.weight > 0 for source in sources) > BLOCK:
        raise UserError(f"sources: more than {BLOCK} with a weight; join some of them")
    exact = [BLOCK * (source.weight / total) for source in sources]
    places = [max(int(share), int(source.weight > 0)) for share, source in zip(exact, sources, strict=True)]
    while (rest := BLOCK - sum(places)) != 0:
        step = 1 if rest > 0 else -1
        # The source that is furthest from its share; one that has a single place keeps it.
        open_ones = [i for i, n in enumerate(places) if n > 0 and n + step > 0]
        nearest = max(open_ones, key=lambda i: (step * (exact[i] - places[i]), -i))
        places[nearest] += step
    return tuple(places)
