"""`tetrascope bench compare`: a training step of ours against one of transformers, one process each, on the CPU.

Both sides get the same weights, the same samples as finished tensors, the same loss, norm clipping and AdamW (torch's
fused one); what is timed is forward, loss, backward and update. Steps alternate, so that both sides meet the same
moods of the machine, and each pair gives a ratio; what is reported is their median and range.

Two batches: `packed`, where transformers gets our packing (positions that restart, no mask), and `unequal`, samples of
very different lengths, which transformers pads to the longest one.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.config import OptimizerSection, ParallelSection
from tetrascope.engine.data.collate import collate
from tetrascope.engine.data.document import Document
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Workload, make_pipeline
from tetrascope.engine.source import memory_source
from tetrascope.engine.step import forward_backward
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.models.layers.attention import pick_attention
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.zero.optimizer import ZeroAdamW

CASES = {"qwen2_vl": "tetrascope.tools.bench.cases.qwen2_vl"}
"""Family -> module with `bench_case(size, batch)`."""

OPTIONS = OptimizerSection(lr=1e-4, weight_decay=0.1)
Step = Callable[[], float]
"""Takes one training step; returns the loss."""


@dataclass(frozen=True)
class Comparison:
    """Seconds a step of either side, pair by pair. parameters: of the model. losses: of the first step of either."""

    size: str
    batch: str
    parameters: int
    tokens: int
    ours: list[float]
    theirs: list[float]
    losses: tuple[float, float]

    @property
    def ratios(self) -> list[float]:
        """Theirs over ours, of each pair, ascending: above 1 we are faster."""
        return sorted(b / a for a, b in zip(self.ours, self.theirs, strict=True))


def our_step(family_name: str, config: Any, weights: dict[str, Tensor], documents: Sequence[Document]) -> Step:
    """The engine's own step. Needs a process group of one rank."""
    return our_engine(family_name, config, weights, documents)[2]


def our_engine(
    family_name: str, config: Any, weights: dict[str, Tensor], documents: Sequence[Document]
) -> tuple[StageModel, ZeroAdamW, Step]:
    """Model, optimizer and the engine's own step. Needs a process group of one rank."""
    family, device = get_family(family_name), torch.device("cpu")
    mesh = Mesh(Layout(), "cpu")
    modules = family_modules(family, config, OPTIONS)
    cut = make_pipeline(family, config, ParallelSection(), modules, Workload(1)).cut
    schedule = GENERATORS["1f1b"](1, 1)
    model = StageModel(family, config, mesh, cut, pick_attention("auto")[1], torch.float32, modules)
    optimizer = build_optimizer(model, OPTIONS, device)
    model.load(memory_source(weights), optimizer)
    rows = sum(len(d.ids_T) for d in documents)
    batch = collate(documents, family, config, rows, 1, 0, True, device)
    total = float(sum(d.weights_T[1:].sum() for d in documents))

    def step() -> float:
        optimizer.zero_grad()
        loss = forward_backward(model, schedule, [batch], total)
        optimizer.step(OPTIONS.lr, optimizer.reduce())
        return loss.item()

    return model, optimizer, step


def their_step(model: torch.nn.Module, inputs: dict[str, Any]) -> Step:
    """The usual training step around transformers' model; `inputs` hold the labels."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIONS.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIONS.lr, betas=OPTIONS.betas, eps=OPTIONS.eps, fused=True)

    def step() -> float:
        adam.zero_grad()
        loss: Tensor = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip or float("inf"))
        adam.step()
        return loss.item()

    return step


def compare(family: str, size: str, pairs: int, warmup: int = 2) -> list[Comparison]:
    """Both batches at one size. Raises UserError for a family or size that cannot be compared.

    Makes a process group of one rank unless there is one.
    """
    if family not in CASES:
        raise UserError(f"bench compare: {family} has no batches to compare; there are some for {', '.join(CASES)}")
    make_case = importlib.import_module(CASES[family]).bench_case
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return [_compare(make_case, family, size, batch, pairs, warmup) for batch in ("packed", "unequal")]
    finally:
        if made:
            dist.destroy_process_group()


def _compare(make_case: Any, family: str, size: str, batch: str, pairs: int, warmup: int) -> Comparison:
    case = make_case(size, batch)
    theirs = their_step(case.model, case.inputs)
    ours = our_step(family, case.config, case.weights, case.documents)
    first = (ours(), theirs())
    for _ in range(warmup):
        ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for side, step in zip(seconds, (ours, theirs), strict=True):
            began = time.perf_counter()
            step()
            side.append(time.perf_counter() - began)
    tokens = sum(len(d.ids_T) for d in case.documents)
    parameters = sum(tensor.numel() for tensor in case.weights.values())
    return Comparison(size, batch, parameters, tokens, *seconds, first)


def bench_compare(family: str, sizes: Sequence[str], pairs: int) -> int:
    """Prints the table of `compare` for several sizes; returns the exit code."""
    table = Table(title=f"{family}: training step, transformers' time / ours ({torch.get_num_threads()} threads)")
    for column in ("size", "parameters", "batch", "tokens", "ours, ms", "transformers, ms", "ratio", "range"):
        table.add_column(column, justify="left" if column in ("size", "batch") else "right")
    for size in sizes:
        for found in compare(family, size, pairs):
            ours, theirs = statistics.median(found.ours), statistics.median(found.theirs)
            ratios = found.ratios
            table.add_row(
                found.size,
                f"{found.parameters:,}",
                found.batch,
                f"{found.tokens:,}",
                f"{ours * 1e3:.1f}",
                f"{theirs * 1e3:.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            )
    Console().print(table)
    return 0
