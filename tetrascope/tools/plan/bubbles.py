"""Bubbles of hand-cut 1F1B beside those of cut and schedule made from costs: `python -m tetrascope.tools.plan.bubbles`.

Two models whose vision encoders weigh much and little beside a stage, and made-up mixtures of the kind they are
trained on. All schedules of a line run the same micro-batches, in simulated time on H100s, and none may hold more
bytes on any stage (weights, gradients and optimizer state included) than the first one on its fullest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tetrascope.engine.config import BatchSection, ModuleSettings, OptimizerSection
from tetrascope.engine.modules import family_modules, trained
from tetrascope.engine.plan import CostModel, Planner, SampleInfo
from tetrascope.engine.predict import (
    Candidate,
    Hardware,
    MicroBatchShape,
    Model,
    Prepared,
    fixed_schedule,
    load_hardware,
    parts,
    prepare,
)
from tetrascope.engine.recompute import Recompute
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.models.internvl.config import InternViTShape, InternVLConfig, InternVLDecoder, tiled
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl.config import media as qwen_picture
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.cost_schedule import cost_schedule
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.partition import search_split
from tetrascope.parallel.pipeline.placement import Placement, fold, loop
from tetrascope.parallel.pipeline.simulator import Timeline, simulate

TRIES = 20
"""Cuts that are tried with schedules made from costs."""

PACK, DP = 8192, 4
"""Tokens of a micro-batch, at most, and data-parallel ranks, of which the one with the most work is looked at."""


def qwen_samples(rng: np.random.Generator, count: int) -> list[SampleInfo]:
    """Documents of text and pictures. 15 % have none; the others 1 to 6, geometric before that limit with the mean of
    OBELICS, 353 M pictures in 141 M documents (arXiv 2306.16527, abstract); text is exponential with that data set's
    mean of 815 tokens (115 G tokens), from 32 to 2,048. Edges of pictures: uniform, 224 to 1,008 pixels. The share
    without pictures, the shapes of the distributions and the sizes are made up."""
    infos = []
    for _ in range(count):
        pictures = 0 if rng.random() < 0.15 else min(6, int(rng.geometric(141 / 353)))
        media = tuple(_qwen_picture(rng) for _ in range(pictures))
        infos.append(_sample(rng, 815, media))
    return infos


def _qwen_picture(rng: np.random.Generator) -> Media:
    rows, columns = (2 * int(edge) for edge in rng.integers(8, 37, 2))
    return qwen_picture("image", (1, rows, columns), 2)


def internvl_samples(rng: np.random.Generator, count: int) -> list[SampleInfo]:
    """Instructions with pictures in tiles. 15 % have no picture, 70 % one of 1 to 12 tiles, as many as InternVL 1.5
    and 2 are trained with (arXiv 2404.16821, §3), and 15 % two to four that share these; a thumbnail beside more than
    one tile. Text is exponential with a mean of 300 tokens, from 32 to 2,048. All shares and distributions are made
    up: uniform in the number of tiles."""
    config = internvl2_26b()
    infos = []
    for _ in range(count):
        pictures = int(rng.choice((0, 1, 2, 3, 4), p=(0.15, 0.7, 0.05, 0.05, 0.05)))
        tiles = [int(rng.integers(1, 12 // max(1, pictures) + 1)) for _ in range(pictures)]
        infos.append(_sample(rng, 300, tuple(tiled(config, (n, 1, n), n + (n > 1)) for n in tiles)))
    return infos


def _sample(rng: np.random.Generator, mean: float, media: tuple[Media, ...]) -> SampleInfo:
    text = int(np.clip(rng.exponential(mean), 32, 2048))
    return SampleInfo(text + sum(one.tokens for one in media), text // 2, media)


def internvl2_26b() -> InternVLConfig:
    """Sizes of InternVL2-26B: InternViT-6B (arXiv 2312.14238, table 1) and InternLM2-20B. Its norms of queries and
    keys, which this encoder does not have, cost next to nothing."""
    return InternVLConfig(
        decoder=InternVLDecoder(6144, 16384, 48, 48, 8, 92553, rms_eps=1e-5, qkv_bias=False, kind="internlm2"),
        vision=InternViTShape(width=3200, layers=45, heads=25, mlp=12800),
        image_token_id=92546,
        eos_token_id=92542,
        pad_token_id=2,
    )


@dataclass(frozen=True)
class Case:
    """A line of the table. planned: whether micro-batches are the planner's, or samples in their order of arrival for
    as long as they fit."""

    model: str
    stages: int
    vision_trained: bool
    planned: bool

    @property
    def micro_batches(self) -> int:
        return 4 * self.stages

    @property
    def layout(self) -> Layout:
        # InternViT-6B has 25 heads: they divide by nothing that divides the decoder's.
        return Layout(pp=self.stages, dp=16, tp=8 if self.model == "qwen2_vl" else 1)

    @property
    def recompute(self) -> Recompute:
        # Without tensor parallelism, activations of the large encoder would fill several GPUs.
        return "none" if self.model == "qwen2_vl" else "full"


@dataclass(frozen=True)
class Bubbles:
    """Shares of the stages' time, 0 to 1. equal: 1F1B, as many layers on every stage; hand: 1F1B with the best number
    fewer on the first; single: cut and schedule from costs, one chunk a stage; best: the same with one or two chunks.
    ours: layers of that one's chunks, and its placement in words. limit: what is left with any schedule and cut, since
    the vision encoder is on one stage and all else, at best, evenly spread over the others."""

    equal: float
    hand: float
    single: float
    best: float
    ours: str
    limit: float


class Study:
    """A case with its micro-batches and costs."""

    def __init__(self, case: Case, hardware: Hardware, seed: int = 0) -> None:
        self.case, self.hardware = case, hardware
        family = get_family(case.model)
        config: Any = family.presets["72b"]() if case.model == "qwen2_vl" else internvl2_26b()
        frozen: dict[str, ModuleSettings] = {} if case.vision_trained else {"vision": ModuleSettings(frozen=True)}
        modules = family_modules(family, config, OptimizerSection(lr=1e-5, modules=frozen))
        self.model = Model(family, config, modules, "bfloat16")
        self.layers: int = config.decoder.layers
        cost = CostModel(config, trained(modules))
        rng = np.random.default_rng(seed)
        draw = qwen_samples if case.model == "qwen2_vl" else internvl_samples
        samples = draw(rng, 40 * case.micro_batches * DP)
        groups = _planned(samples, case.micro_batches, cost) if case.planned else _arriving(samples, case.micro_batches)
        self.shapes = tuple(MicroBatchShape.of(infos, case.layout) for infos in groups)
        self.parts = parts(self.model, case.layout, case.recompute, self.shapes, hardware)

    def prepared(self, placement: Placement, counts: Sequence[int], vision_chunk: bool) -> tuple[Cut, Prepared]:
        cut = Cut.of(placement, counts, vision_chunk)
        candidate = Candidate(self.case.layout, cut, "1f1b", self.case.recompute)
        return cut, prepare(self.model, candidate, self.shapes, self.hardware, parts=self.parts)

    def one_f_one_b(self, counts: Sequence[int]) -> tuple[Timeline, Prepared]:
        """1F1B with vision on the first stage."""
        cut, prepared = self.prepared(loop(self.case.stages), counts, vision_chunk=False)
        candidate = Candidate(self.case.layout, cut, "1f1b", self.case.recompute)
        schedule = fixed_schedule(candidate, len(self.shapes), prepared.costs, prepared.caps, prepared.frozen)
        return simulate(schedule, prepared.costs), prepared

    def from_costs(
        self, placement: Placement, start: Sequence[int], most: float, effort: int
    ) -> tuple[Timeline, list[int]] | None:
        """Schedule and cut made from costs, with at most so many bytes on any stage; None where there is no room."""

        def run(counts: Sequence[int], effort: int, capped: bool = True) -> Timeline | None:
            cut, prepared = self.prepared(placement, counts, vision_chunk=True)
            caps = [most - held.static - held.workspace_bytes for held in prepared.static] if capped else None
            try:
                schedule = cost_schedule(
                    cut.placement, len(self.shapes), prepared.costs, caps, prepared.frozen, True, effort=effort
                )
            except UserError:
                return None  # not even one micro-batch at a time fits
            return simulate(schedule, prepared.costs)

        def seconds(counts: Sequence[int], effort: int, capped: bool = True) -> float:
            timeline = run(counts, effort, capped)
            return float("inf") if timeline is None else timeline.makespan

        # First for the fixed schedules, which are quickly made, then for a few of those that memory allows.
        fast = search_split(list(start), lambda counts: seconds(counts, 0, capped=False))
        feasible = min((fast, list(start)), key=lambda counts: seconds(counts, 0))
        counts = search_split(feasible, lambda counts: seconds(counts, effort // 6), tries=TRIES)
        timeline = run(counts, effort)
        return None if timeline is None else (timeline, counts)

    def bubbles(self, effort: int = 60) -> Bubbles:
        """All schedules of this case."""
        stages = self.case.stages
        equal, prepared = self.one_f_one_b(even(self.layers, stages))
        most = max(
            held.static + held.workspace_bytes + peak
            for held, peak in zip(prepared.static, equal.peak_bytes, strict=True)
        )
        cuts = [by_hand(self.layers, stages, fewer) for fewer in range(self.layers // stages)]
        hand = min((self.one_f_one_b(cut)[0] for cut in cuts), key=lambda timeline: timeline.makespan)
        tried = []
        for words, placement in (("", loop(stages)), ("loop ", loop(stages, 2)), ("fold ", fold(stages))):
            start = even(self.layers, len(placement))
            found = self.from_costs(placement, start, most, effort)
            if found is not None:
                tried.append((found[0].bubble_share, words + " ".join(map(str, found[1]))))
        return Bubbles(equal.bubble_share, hand.bubble_share, tried[0][0], *min(tried), self.limit())

    def limit(self) -> float:
        """See Bubbles."""
        stages = self.case.stages
        _, prepared = self.prepared(loop(stages), even(self.layers, stages), vision_chunk=True)
        costs = prepared.costs
        tables = (costs.forward, costs.backward_input, costs.backward_weight)
        work = [sum(sum(table[chunk]) for table in tables) for chunk in range(stages + 1)]
        # At least one layer goes with the encoder.
        first = work[0] + work[1] / (self.layers // stages)
        return max(0.0, 1 - sum(work) / (stages * first))


def _planned(samples: Sequence[SampleInfo], micro_batches: int, cost: CostModel) -> list[list[SampleInfo]]:
    batch = BatchSection(tokens=PACK * micro_batches * DP, pack=PACK)
    planner = Planner.single(samples, 0, Layout(dp=DP), batch, cost=cost)
    plan = planner.plan(0)
    infos = [planner.info(draw) for draw in plan.draws]
    ranks = [[[infos[i] for i in micro.samples] for micro in rank] for rank in plan.micro_batches]
    return max(ranks, key=lambda rank: sum(sum(cost(info)) for micro in rank for info in micro))


def _arriving(samples: Iterable[SampleInfo], micro_batches: int) -> list[list[SampleInfo]]:
    groups: list[list[SampleInfo]] = [[]]
    for info in samples:
        if groups[-1] and sum(one.tokens for one in groups[-1]) + info.tokens > PACK:
            if len(groups) == micro_batches:
                break
            groups.append([])
        groups[-1].append(info)
    return groups


def even(layers: int, chunks: int) -> list[int]:
    """As many layers for each chunk, the last ones one fewer where they do not divide."""
    return [layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)]


def by_hand(layers: int, stages: int, fewer: int) -> list[int]:
    """So many fewer layers on the first stage than an equal share; the others share alike."""
    first = layers // stages - fewer
    return [first, *even(layers - first, stages - 1)]


def cases() -> list[Case]:
    """The lines of the table."""
    return [
        Case(model, stages, learns, planned)
        for model in ("qwen2_vl", "internvl")
        for stages in (4, 8)
        for learns in (True, False)
        for planned in (False, True)
    ]


NAMES = {"qwen2_vl": "Qwen2-VL-72B", "internvl": "InternVL2-26B"}


def main(effort: int = 60, hardware: str = "h100-sxm") -> None:
    """Prints the table. effort: of the schedules made from costs; hardware: a profile."""
    profile = load_hardware(hardware)
    made = Table(title=f"bubble, % of the stages' time, simulated on {profile.name}; micro-batches of {PACK} tokens")
    for column in (
        "model",
        "PP",
        "vision",
        "micro-batches",
        "1F1B equal",
        "1F1B by hand",
        "cost",
        "cost, 1-2 chunks",
        "limit",
    ):
        made.add_column(column, justify="left" if column in ("model", "vision") else "right")
    for column in ("of equal", "of by hand", "layers"):
        made.add_column(column, justify="right")
    console = Console(width=180)
    began = time.perf_counter()
    for case in cases():
        found = Study(case, profile).bubbles(effort)
        made.add_row(
            NAMES[case.model],
            str(case.stages),
            "trained" if case.vision_trained else "frozen",
            f"{case.micro_batches} {'planned' if case.planned else 'as they come'}",
            *(f"{100 * share:.1f}" for share in (found.equal, found.hand, found.single, found.best, found.limit)),
            f"{found.best / found.equal:.2f}",
            f"{found.best / found.hand:.2f}",
            found.ours,
        )
        console.print(f"{case}: {found}", highlight=False, soft_wrap=True)
    console.print(made)
    console.print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
