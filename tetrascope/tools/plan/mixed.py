"""A made-up mixture of text, images and videos, and how well it is planned: `python -m tetrascope.tools.plan.mixed`.

Costs are those of Qwen2-VL 7B, everything trained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from tetrascope.engine.config import BatchSection
from tetrascope.engine.plan import Cost, CostModel, Figures, Planner, PlanReport, SampleInfo, report
from tetrascope.models.family import get_family
from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Layout

PACK, RANKS, MICRO_BATCHES = 32768, 8, 16
LONGEST_VIDEO = 16384


def mixed_example(seed: int, n: int) -> list[SampleInfo]:
    """So many samples: 60 % text of 50 to 800 tokens, 30 % with one image of 16 to 4096 tokens, 7 % with 2 to 6 of
    them, 3 % with a video of up to 16k tokens; all but text with a question of 20 to 300 tokens."""
    rng = np.random.default_rng(seed)
    infos = []
    for kind in rng.choice(4, size=n, p=(0.6, 0.3, 0.07, 0.03)).tolist():
        if kind == 0:
            media: tuple[Media, ...] = ()
            text = int(rng.integers(50, 801))
        else:
            counts = {1: 1, 2: int(rng.integers(2, 7))}
            media = (_video(rng),) if kind == 3 else tuple(_picture(rng) for _ in range(counts[kind]))
            text = int(rng.integers(20, 301))
        infos.append(SampleInfo(text + sum(one.tokens for one in media), text // 2, media))
    return infos


def _side(rng: np.random.Generator, most: int) -> int:
    """Tokens along an edge, small ones more often than large ones."""
    return int(np.exp(rng.uniform(np.log(4), np.log(most + 1))))


def _picture(rng: np.random.Generator) -> Media:
    return _media("image", 1, _side(rng, 64), _side(rng, 64))


def _video(rng: np.random.Generator) -> Media:
    height, width = _side(rng, 24), _side(rng, 24)
    most = LONGEST_VIDEO // (height * width)
    return _media("video", int(rng.integers(2, min(most, 256) + 1)), height, width)


def _media(kind: str, frames: int, height: int, width: int) -> Media:
    """Of so many tokens along its edges; four patches make a token."""
    tokens = frames * height * width
    of_frames = (4 * height * width,) * frames
    return Media("video" if kind == "video" else "image", (frames, 2 * height, 2 * width), of_frames, tokens, tokens)


@dataclass(frozen=True)
class Measured:
    """Reports of consecutive steps, samples planned, and the seconds that planning took."""

    reports: list[PlanReport]
    samples: int
    seconds: float


def measure(seed: int, samples: int, steps: int) -> Measured:
    """Plans the first steps of a run over the example: 8 ranks with 16 packs of 32768 tokens each."""
    family = get_family("qwen2_vl")
    cost = CostModel(family.presets["7b"]())
    batch = BatchSection(tokens=PACK * RANKS * MICRO_BATCHES, pack=PACK)
    planner = Planner.single(mixed_example(seed, samples), seed, Layout(dp=RANKS), batch, cost=cost)
    began = time.perf_counter()
    plans = [planner.plan(step) for step in range(steps)]
    seconds = time.perf_counter() - began
    return Measured([report(planner, plan) for plan in plans], sum(len(plan.draws) for plan in plans), seconds)


def table(reports: Sequence[PlanReport]) -> Table:
    """The mean of the steps and, in brackets, the worst of them, planned and naive."""
    made = Table(title=f"{len(reports)} steps, DP {RANKS}, {MICRO_BATCHES} micro-batches of {PACK} tokens a rank")
    for column in ("", "planned", "naive arrival order"):
        made.add_column(column, justify="left" if not column else "right")

    def row(name: str, values: list[list[float]], worst: object) -> None:
        made.add_row(name, *(f"{statistics.mean(v):.4f} ({worst(v):.4f})" for v in values))  # type: ignore[operator]

    both: list[list[Figures]] = [[r.planned for r in reports], [r.naive for r in reports]]
    row("packing efficiency", [[f.efficiency for f in figures] for figures in both], min)
    for kind in Cost._fields:
        for of, name in (("ranks", "ranks"), ("micro_batches", "micro-batches")):
            loads = [[float(getattr(getattr(f, of), kind)) for f in figures] for figures in both]
            row(f"{kind}: max / mean of {name}", loads, max)
    return made


def main() -> None:
    found = measure(seed=0, samples=40_000, steps=10)
    console = Console()
    console.print(table(found.reports))
    console.print(f"{found.samples} samples planned in {1000 * found.seconds / found.samples:.3f} ms each, one core")


if __name__ == "__main__":
    main()
