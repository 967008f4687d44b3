"""`train --dry-run`: a run at its real size without weights, data or other ranks.

The configuration is checked as for a run; every pipeline stage of the first tensor- and data-parallel rank is then
built on the meta device, with its optimizer, in a process group that only pretends to have all the ranks; and a step
is planned over made-up samples, each with one picture of usual size. What a file's contents would decide (data,
tokenizer, weights) is not looked at: the model's sizes come from `model.preset`, or from `model.config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from rich.table import Table

from tetrascope.engine import flops
from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.config import Config
from tetrascope.engine.modules import summary, trained
from tetrascope.engine.pipeline import QUESTION_TOKENS
from tetrascope.engine.plan import CostModel, Planner, SampleInfo, StepPlan
from tetrascope.engine.setup import Blueprint, blueprint
from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.zero.flat import TrainedGroup

COLUMNS = ("stage", "layers", "parameters, M", "trained, M", "weights, GiB", "gradients", "optimizer", "in all")


@dataclass(frozen=True)
class StageSize:
    """What one rank of a pipeline stage holds: decoder layers, parameters of its tensor-parallel share, bytes.

    weight_bytes: parameters; gradient_bytes: fp32 gradients; state_bytes: this rank's ZeRO share of fp32 masters (where
    the parameters are not fp32 themselves) and moments.
    """

    layers: list[int]
    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.state_bytes


@dataclass(frozen=True)
class DryRun:
    """A planned run. flops: of one step, forward and backward."""

    blueprint: Blueprint
    stages: list[StageSize]
    plan: StepPlan
    tokens: int
    flops: float


def dry_run(config: Config) -> DryRun:
    """Plans a run; no process group may exist. Raises UserError for whatever is wrong with the configuration."""
    made = blueprint(config, None)
    media = made.model_config.typical
    tokens = min(media.tokens + QUESTION_TOKENS, config.data.max_tokens)
    enough = config.batch.samples or -(-(config.batch.tokens or 0) // tokens)
    infos = [SampleInfo(tokens, QUESTION_TOKENS // 2, (media,))] * enough
    learning = trained(made.modules)
    cost = CostModel(made.model_config, learning)
    plan = Planner.single(infos, config.train.seed, made.layout, config.batch, config.data.shuffle, cost).plan(0)
    samples = len(plan.draws)
    vision, language = flops.training_flops(made.model_config, [media] * samples, [tokens] * samples, learning)
    stages = [_stage(config, made, stage) for stage in range(made.layout.pp)]
    return DryRun(made, stages, plan, tokens * samples, vision + language)


def _stage(config: Config, made: Blueprint, stage: int) -> StageSize:
    # torch's own pretence of a process group, which its tools for memory estimates use too; importing registers it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = made.layout.rank({"pp": stage, "dp": 0, "ring": 0, "ulysses": 0, "tp": 0})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=made.layout.world)
    try:
        mesh = Mesh(made.layout, "cpu")
        dtype = getattr(torch, config.train.dtype)
        cut = made.pipeline.cut
        model = StageModel(made.family, made.model_config, mesh, cut, made.attention[1], dtype, made.modules)
        groups = build_optimizer(model, config.optimizer, torch.device("meta")).groups
    finally:
        dist.destroy_process_group()
    grown = [group for group in groups if isinstance(group, TrainedGroup)]
    masters = sum(group.share * 4 for group in grown if dtype != torch.float32)
    counts = {group: sum(span.stop - span.start for span in group.spans.values()) for group in groups}
    return StageSize(
        layers=model.layers,
        parameters=sum(counts.values()),
        trained=sum(counts[group] for group in grown),
        weight_bytes=sum(group.params.nbytes for group in groups),
        gradient_bytes=sum(group.grads.nbytes for group in grown),
        state_bytes=masters + sum(2 * group.share * 4 for group in grown),
    )


def describe(found: DryRun) -> tuple[Table, list[str]]:
    """The table of stages, and lines about the model and the step."""
    made = found.blueprint
    table = Table(title=f"{made.family.name}: first rank of every stage, {made.layout}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for number, stage in enumerate(found.stages):
        held = _ranges(stage.layers)
        sizes = (stage.weight_bytes, stage.gradient_bytes, stage.state_bytes, stage.bytes)
        table.add_row(
            str(number),
            held,
            f"{stage.parameters / 1e6:,.1f}",
            f"{stage.trained / 1e6:,.1f}",
            *(f"{size / 2**30:,.1f}" for size in sizes),
        )
    rows = [micro.rows for rank in found.plan.micro_batches for micro in rank]
    return table, [
        summary(made.family.weights(made.model_config), made.modules),
        f"a step of {len(found.plan.draws)} samples with a picture each: {found.tokens:,} tokens, "
        f"micro-batches of up to {max(rows):,} tokens, {found.flops / 1e12:,.1f} TFLOP; activations not counted",
    ]


def _ranges(numbers: list[int]) -> str:
    """0-3, 8-11 for the numbers from 0 to 3 and from 8 to 11."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(f"{run[0]}-{run[-1]}" for run in runs if run)
