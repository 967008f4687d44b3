"""The micro-batches that a layout would get: samples from a made-up mixture or from the run's own index.

Which samples share a micro-batch is the planner's decision, as in a run, so that they are as unequal as they will be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tetrascope.engine.config import BatchSection
from tetrascope.engine.data.mixture import Mixture
from tetrascope.engine.dryrun import QUESTION_TOKENS
from tetrascope.engine.plan import Cost, CostFn, Planner, SampleInfo, SourceIndex
from tetrascope.engine.plan.packing import pool_target
from tetrascope.engine.setup import Blueprint
from tetrascope.errors import UserError
from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Layout

MicroBatches = tuple[tuple[SampleInfo, ...], ...]
"""The samples of every micro-batch of a data-parallel rank."""

RANKS = 4
"""Data-parallel ranks that samples are drawn for at most; there are more of the same kind where there are more."""

ASKED = "--images"


@dataclass(frozen=True)
class Mix:
    """A made-up mixture of samples. images: number of pictures in a sample -> share of the samples, adding up to 1.

    text: tokens of a sample beside its pictures, half of them supervised. size: width and height of a picture in
    pixels; None: the family's typical one.
    """

    images: tuple[tuple[int, float], ...] = ((1, 1.0),)
    text: int = QUESTION_TOKENS
    size: tuple[int, int] | None = None

    @classmethod
    def parse(cls, images: str | None, text: int | None, size: str | None) -> Mix:
        """From the command line: `0:0.2,1:0.5,4:0.3` and `1280x720`; None for the defaults.

        Raises UserError for what cannot be read, for shares that do not add up to 1, and for samples without a token.
        """
        made = replace(cls(), text=QUESTION_TOKENS if text is None else text)
        if made.text < 1:
            raise UserError(f"--text: expected a number of tokens of at least 1, not {made.text}")
        if images is not None:
            made = replace(made, images=_shares(images))
        return made if size is None else replace(made, size=_size(size))

    def __str__(self) -> str:
        parts = ", ".join(f"{100 * share:g} % with {count}" for count, share in self.images)
        size = "typical size" if self.size is None else f"{self.size[0]}×{self.size[1]} pixels"
        return f"{self.text} tokens of text and pictures of {size}: {parts}"

    def samples(self, made: Blueprint) -> tuple[SampleInfo, ...]:
        """One sample of every kind. Raises UserError for one that is longer than data.max_tokens."""
        found = []
        for count, _ in self.images:
            media = (self._picture(made, count),) * count
            tokens = self.text + sum(one.tokens for one in media)
            if tokens > made.config.data.max_tokens:
                raise UserError(
                    f"{ASKED}: a sample with {count} pictures has {tokens} tokens, more than data.max_tokens="
                    f"{made.config.data.max_tokens}; raise that, or give fewer or smaller pictures (--image-size)"
                )
            found.append(SampleInfo(tokens, max(1, self.text // 2), media))
        return tuple(found)

    def _picture(self, made: Blueprint, images: int) -> Media:
        if self.size is None:
            return made.model_config.typical
        return made.family.media(made.model_config, made.config.data).image(*self.size, images)


def _shares(text: str) -> tuple[tuple[int, float], ...]:
    expected = f"{ASKED}: {text!r} is not of the form COUNT:SHARE,COUNT:SHARE, as in 0:0.2,1:0.5,4:0.3"
    found: dict[int, float] = {}
    for part in text.split(","):
        count, colon, share = part.partition(":")
        try:
            number, value = int(count), float(share)
        except ValueError as error:
            raise UserError(expected) from error
        if not colon or number < 0 or not 0 < value <= 1 or number in found:
            raise UserError(f"{expected}, each count once, with shares above 0")
        found[number] = value
    if not math.isclose(sum(found.values()), 1, abs_tol=1e-6):
        raise UserError(f"{ASKED}: the shares of {text!r} add up to {sum(found.values()):g}, expected 1")
    return tuple(sorted(found.items()))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--image-size: {text!r} is not of the form WIDTHxHEIGHT in pixels, as in 1280x720")
    return int(width), int(height)


def spread_evenly(shares: Sequence[float], count: int) -> list[int]:
    """So many draws, each the number of a share: every prefix has each in its share, to less than one draw or so."""
    drawn = [0] * len(shares)
    order = []
    for n in range(1, count + 1):
        number = max(range(len(shares)), key=lambda i: (shares[i] * n - drawn[i], -i))
        drawn[number] += 1
        order.append(number)
    return order


class Workload:
    """Micro-batches for any layout and batch. Drawn once for each, and the same whenever asked for.

    mix: a made-up mixture; data: the run's own, which then decides in place of it.
    """

    def __init__(self, made: Blueprint, cost: CostFn, mix: Mix, data: Mixture | None = None) -> None:
        self._made, self._cost, self._mix, self._data = made, cost, mix, data
        self._costs: dict[int, Cost] = {}
        self._kinds = mix.samples(made) if data is None else ()
        self._drawn: dict[tuple[str, int], MicroBatches] = {}

    def __str__(self) -> str:
        return str(self._mix) if self._data is None else "the run's own data"

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        if self._data is None:
            return max(info.tokens for info in self._kinds)
        return max(
            int(source.lengths.max()) if source.lengths is not None else max(info.tokens for info in source.infos)
            for source in self._data.for_planner()
        )

    def cost(self, info: SampleInfo) -> Cost:
        """What a sample costs."""
        # Made-up samples are few objects, many times.
        if self._data is not None:
            return self._cost(info)
        if id(info) not in self._costs:
            self._costs[id(info)] = self._cost(info)
        return self._costs[id(info)]

    def typical(self) -> list[SampleInfo]:
        """A hundred samples that stand for all."""
        if self._data is None:
            return [self._kinds[number] for number in spread_evenly([share for _, share in self._mix.images], 100)]
        planner = Planner(self._data.for_planner(), self._made.config.train.seed, Layout(), BatchSection(samples=1))
        return [planner.info(planner.stream[position]) for position in range(100)]

    def micro_batches(self, batch: BatchSection, dp: int) -> MicroBatches:
        """The samples of every micro-batch, in order, of the rank with the most work of `dp`.

        Raises UserError where the batch cannot be shared out so.
        """
        per_rank = batch.per_rank(dp)
        ranks = min(dp, RANKS)
        if batch.samples is not None and batch.samples < dp * per_rank:
            raise UserError(
                f"batch.samples: fewer samples than micro-batches, with {per_rank} of them on each of {dp} ranks"
            )
        small = _share(batch, dp, ranks)
        key = (small.model_dump_json(), ranks)
        if key not in self._drawn:
            self._drawn[key] = self._plan(small, ranks)
        return self._drawn[key]

    def _plan(self, batch: BatchSection, ranks: int) -> MicroBatches:
        planner = Planner(self._sources(batch), self._made.config.train.seed, Layout(dp=ranks), batch, self.cost)
        plan = planner.plan(0)
        infos = [planner.info(draw) for draw in plan.draws]
        found = [tuple(tuple(infos[i] for i in micro.samples) for micro in rank) for rank in plan.micro_batches]
        return max(found, key=lambda rank: sum(sum(self.cost(info)) for micro in rank for info in micro))

    def _sources(self, batch: BatchSection) -> Sequence[SourceIndex]:
        if self._data is not None:
            return self._data.for_planner()
        mean = sum(share * kind.tokens for (_, share), kind in zip(self._mix.images, self._kinds, strict=True))
        count = batch.samples or 0
        if batch.packs is not None and batch.pack is not None:
            count = 2 + math.ceil(pool_target(batch.packs, batch.pack) / mean * 1.05)
        order = spread_evenly([share for _, share in self._mix.images], count)
        infos = [self._kinds[number] for number in order]
        lengths = np.array([info.tokens for info in infos], dtype=np.int64)
        return [SourceIndex("the made-up mixture", infos, lengths=lengths)]


def _share(batch: BatchSection, dp: int, ranks: int) -> BatchSection:
    """The batch of so many of `dp` ranks."""
    if batch.samples is not None:
        return batch.model_copy(update={"samples": math.ceil(batch.samples * ranks / dp)})
    return batch.model_copy(update={"tokens": (batch.tokens or 0) // dp * ranks})
