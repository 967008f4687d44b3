"""`python -m tetrascope.tools.bench.pipeline`: a pipeline of two stages against one rank, and both simulated.

Rounds alternate between one rank, which runs the two chunks of the model one after the other, and two ranks with one
chunk each; every rank has one thread. The first gives what the chunks' actions take, from which the simulator says how
long the second will take. Needs two cores with little else to do: the shares of the processor that the ranks got
are printed beside the times.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.data.collate import collate
from tetrascope.engine.modules import family_modules
from tetrascope.engine.source import random_source
from tetrascope.engine.step import forward_backward
from tetrascope.models.family import get_family
from tetrascope.models.layers.attention import pick_attention
from tetrascope.models.qwen2_vl.config import Qwen2VLDecoder, Qwen2VLVision
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.actions import Action, Schedule
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.recorder import Measured, Recorder
from tetrascope.parallel.pipeline.simulator import Costs, simulate
from tetrascope.tools.verify.families import qwen2_vl as family
from tetrascope.tools.verify.pool import WorkerPool

CHUNKS = 2
WARM_UP = 1


@dataclass(frozen=True)
class Steps:
    """One rank's steps of a round: seconds from barrier to barrier, seconds of the processor, the actions."""

    seconds: list[float]
    processor: list[float]
    spans: list[list[Measured]]


def schedules(name: str, micro_batches: int) -> dict[int, Schedule]:
    """By number of ranks: two chunks on one, one micro-batch after the other; and the schedule that is measured."""
    return {1: GENERATORS["interleaved"](1, micro_batches, CHUNKS), 2: GENERATORS[name](CHUNKS, micro_batches)}


def run_steps(split: tuple[int, ...], schedule: Schedule, micro_batches: int, tokens: int, steps: int) -> Steps:
    """Forward and backward of a model of 20 M parameters, `steps` times after a first one."""
    placement = (0,) * CHUNKS if len(schedule) == 1 else tuple(range(CHUNKS))
    decoder = Qwen2VLDecoder(hidden=384, intermediate=1024, layers=sum(split), heads=6, kv_heads=2, vocab=2048)
    config = replace(family.tiny_config(), decoder=decoder, vision=Qwen2VLVision(128, 2, 4), mrope_section=(8, 12, 12))
    engine, device = get_family("qwen2_vl"), torch.device("cpu")
    options = OptimizerSection(lr=1e-4)
    modules = family_modules(engine, config, options)
    mesh = Mesh(Layout(pp=len(schedule)), "cpu")
    cut = Cut.of(placement, split)
    model = StageModel(engine, config, mesh, cut, pick_attention("auto")[1], torch.float32, modules)
    optimizer = build_optimizer(model, options, device)
    model.load(random_source(0, lambda name, shape: engine.initial(config, name, shape)), optimizer)
    batches = []
    for m in range(micro_batches):
        document = family.make_document(config, (8, (1, 8, 8), tokens - 26), m)
        batches.append(collate([document], engine, config, len(document.ids_T), 1, 0, mesh.first_stage, device))
    found = Steps([], [], [])
    for step in range(WARM_UP + steps):
        optimizer.zero_grad()
        dist.barrier()
        recorder, began, worked = Recorder(device), time.perf_counter(), time.process_time()
        forward_backward(model, schedule, batches, 1.0, recorder)
        worked = time.process_time() - worked
        dist.barrier()
        if step >= WARM_UP:
            found.seconds.append(time.perf_counter() - began)
            found.processor.append(worked)
            found.spans.append(recorder.spans)
    return found


def costs_of(spans: list[list[Measured]], micro_batches: int) -> Costs:
    """Medians of what the actions took."""
    seconds: dict[Action, list[float]] = defaultdict(list)
    for step in spans:
        for one in step:
            seconds[one.action].append(one.end - one.start)
    table = {
        kind: [
            [statistics.median(seconds[a]) for m in range(micro_batches) for a in seconds if _is(a, kind, m, chunk)]
            for chunk in range(CHUNKS)
        ]
        for kind in ("F", "B")
    }
    nothing = [[0.0] * micro_batches] * CHUNKS
    return Costs(table["F"], table["B"], nothing)


def _is(action: Action, kind: str, micro_batch: int, chunk: int) -> bool:
    return (action.kind.value, action.micro_batch, action.chunk) == (kind, micro_batch, chunk)


def main(
    split: Annotated[str, typer.Option(help="Decoder layers of the two stages.")] = "8,8",
    micro_batches: Annotated[int, typer.Option(min=2)] = 8,
    tokens: Annotated[int, typer.Option(help="Of a micro-batch.", min=64)] = 384,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Of a round.", min=1)] = 3,
) -> None:
    """Prints, for each round, seconds of both and their ratio, and in the end medians beside ideal and simulation."""
    console = Console(width=160)
    counts = tuple(int(n) for n in split.split(","))
    both = schedules("1f1b", micro_batches)
    ratios, errors = [], []
    with WorkerPool(size=CHUNKS) as pool:
        for number in range(rounds):
            alone = pool.run(run_steps, counts, both[1], micro_batches, tokens, steps, world=1)[0]
            stages = pool.run(run_steps, counts, both[2], micro_batches, tokens, steps, world=2)
            one, two = statistics.median(alone.seconds), statistics.median(stages[0].seconds)
            predicted = simulate(both[2], costs_of(alone.spans, micro_batches))
            busy = predicted.busy
            ratios.append(one / two)
            errors.append(predicted.makespan / two)
            share = sum(sum(s.processor) for s in stages) / sum(sum(_busy(s)) for s in stages)
            console.print(
                f"round {number}: 1 rank {one:.3f} s, 2 stages {two:.3f} s, ratio {one / two:.3f}; simulated "
                f"{predicted.makespan:.3f} s ({predicted.makespan / two:.3f} of measured); stages' work "
                f"{busy[0]:.3f} and {busy[1]:.3f} s, ideal {sum(busy) / predicted.makespan:.3f}; processor while at "
                f"work {share:.2f}"
            )
    ideal = CHUNKS * micro_batches / (micro_batches + CHUNKS - 1)
    middle = statistics.median(ratios)
    console.print(
        f"speed-up, median {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of {ideal:.3f} with equal stages: "
        f"{middle / ideal:.1%}; simulated over measured, median {statistics.median(errors):.3f} "
        f"({min(errors):.3f} to {max(errors):.3f})"
    )


def _busy(found: Steps) -> list[float]:
    return [one.end - one.start for step in found.spans for one in step]


if __name__ == "__main__":
    from tetrascope.tools.bench import pipeline  # workers find functions by their module, not in a script

    typer.run(pipeline.main)
