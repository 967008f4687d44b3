"""What `tetrascope plan` chooses between: sizes of the axes, of micro-batches, schedules, recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tetrascope.engine.config import BatchSection
from tetrascope.engine.pipeline import COST
from tetrascope.engine.recompute import Recompute
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.placement import Placement, fold, loop

RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
"""Which activations are computed again in the backward."""

PACKS = (1, 2, 4)
"""How many times longer, or shorter, than the configured ones packs may be."""


@dataclass(frozen=True)
class Pipelining:
    """A schedule by name, chunks of a stage, and, for the one made from costs, whether they are folded into a V. That
    one has the vision encoder as a chunk of its own."""

    schedule: str
    virtual_stages: int = 1
    folded: bool = False

    @property
    def vision_chunk(self) -> bool:
        return self.schedule == COST

    @property
    def split(self) -> bool:
        """Whether backwards are, or may be, made in two parts."""
        return self.schedule in ("zb-h1", "zb-v", COST)

    @property
    def plain(self) -> Pipelining:
        """A fixed schedule of the same placement."""
        if self.schedule != COST:
            return self
        if self.folded:
            return Pipelining("zb-v", 2)
        return Pipelining("1f1b") if self.virtual_stages == 1 else Pipelining("interleaved", self.virtual_stages)

    def __str__(self) -> str:
        chunks = f" v={self.virtual_stages}" if self.virtual_stages > 1 else ""
        return f"{self.schedule}{chunks}{' folded' if self.folded else ''}"

    def place(self, stages: int) -> Placement:
        """The stage of every chunk, that of the vision encoder's own not counted."""
        if self.schedule == COST:
            return fold(stages) if self.folded else loop(stages, self.virtual_stages)
        return GENERATORS[self.schedule].place(stages, self.virtual_stages)


FIXED = (
    Pipelining("1f1b"),
    Pipelining("gpipe"),
    Pipelining("zb-h1"),
    Pipelining("interleaved", 2),
    Pipelining("interleaved", 3),
    Pipelining("interleaved", 4),
    Pipelining("zb-v", 2),
)
"""Schedules that depend on nothing but numbers, the plainest first."""

PLANNED = (Pipelining(COST), Pipelining(COST, 2), Pipelining(COST, 2, folded=True))
"""Those that follow from costs; they take much longer to make."""


def layouts(gpus: int) -> Iterator[Layout]:
    """All ways to lay out so many GPUs."""
    for tp in _divisors(gpus):
        for pp in _divisors(gpus // tp):
            for ulysses in _divisors(gpus // tp // pp):
                for ring in _divisors(gpus // tp // pp // ulysses):
                    yield Layout(pp=pp, dp=gpus // tp // pp // ulysses // ring, ring=ring, ulysses=ulysses, tp=tp)


def batches(batch: BatchSection, layout: Layout, longest: int) -> list[BatchSection]:
    """The same global batch in micro-batches of other sizes.

    Counted in samples: 1, 2, 4, ... samples in a micro-batch, and the configured number of micro-batches. Counted in
    tokens: packs up to four times as long or as short, none shorter than the longest sample. Context parallelism
    divides what cannot be made smaller: with it, micro-batches are the smallest.
    """
    smallest = layout.ring * layout.ulysses > 1
    if batch.samples is not None:
        share = batch.samples // layout.dp
        counts = {batch.micro_batches, *(max(1, share // 2**k) for k in range(max(1, share.bit_length())))}
        made = [batch.model_copy(update={"micro_batches": count}) for count in sorted(counts)]
        return made[-1:] if smallest else made
    tokens, pack = batch.tokens or 0, batch.pack or 0
    lengths = {pack, *(pack * k for k in PACKS), *(pack // k for k in PACKS if pack % k == 0)}
    fitting = [length for length in sorted(lengths) if tokens % length == 0 and (length >= longest or length == pack)]
    made = [batch.model_copy(update={"pack": length}) for length in fitting]
    return made[:1] if smallest else made


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
