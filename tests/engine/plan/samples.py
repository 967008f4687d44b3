"""Made-up samples for the tests of the plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tetrascope.engine.config import BatchSection
from tetrascope.engine.plan import Planner, SampleInfo, StepPlan
from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Layout


def image(rows: int, columns: int, frames: int = 1) -> Media:
    """So many patches a frame; four patches make a token."""
    tokens = frames * rows * columns // 4
    return Media("image", (frames, rows, columns), (rows * columns,) * frames, tokens, tokens)


def random_infos(count: int, seed: int = 0) -> list[SampleInfo]:
    """Text of 20 to 400 tokens; two samples in three have a picture of 16 to 1600 patches."""
    rng = np.random.default_rng(seed)
    infos = []
    for i in range(count):
        shown = () if i % 3 == 0 else (image(2 * int(rng.integers(2, 21)), 2 * int(rng.integers(2, 21))),)
        tokens = int(rng.integers(20, 400)) + sum(one.tokens for one in shown)
        infos.append(SampleInfo(tokens, tokens // 4, shown))
    return infos


def texts(lengths: Sequence[int]) -> list[SampleInfo]:
    """Text samples of the given lengths."""
    return [SampleInfo(tokens, max(tokens // 2, 1), ()) for tokens in lengths]


def by_samples(
    infos: Sequence[SampleInfo], samples: int, micro_batches: int = 1, seed: int = 0, shuffle: bool = True, **axes: int
) -> Planner:
    batch = BatchSection(samples=samples, micro_batches=micro_batches)
    return Planner.single(infos, seed, Layout(**axes), batch, shuffle)


def by_tokens(infos: Sequence[SampleInfo], packs: int, capacity: int, seed: int = 0, **axes: int) -> Planner:
    return Planner.single(infos, seed, Layout(**axes), BatchSection(tokens=packs * capacity, pack=capacity))


def placed(plan: StepPlan) -> list[int]:
    """The draws of all micro-batches, as they come."""
    return [place for rank in plan.micro_batches for micro in rank for place in micro.samples]


def positions(plan: StepPlan) -> list[int]:
    return [draw.position for draw in plan.draws]


def numbers(plan: StepPlan) -> list[int]:
    """Sample numbers of the step."""
    return [draw.sample for draw in plan.draws]
