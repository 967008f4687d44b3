"""Runs a case in one layout, on every rank, with the engine's own parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.engine.attention import context_attention
from tetrascope.engine.build import StageModel, build_optimizer, check_layout
from tetrascope.engine.config import BatchSection
from tetrascope.engine.data.collate import MicroBatch, collate
from tetrascope.engine.data.document import ContextPlace, Document
from tetrascope.engine.logical import Shard
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Workload, make_pipeline
from tetrascope.engine.plan import Planner, SampleInfo, StepPlan
from tetrascope.engine.predict import Model, load_hardware
from tetrascope.engine.source import memory_source
from tetrascope.engine.step import forward_backward
from tetrascope.engine.step_schedule import StepSchedules
from tetrascope.models.family import get_family
from tetrascope.models.layers.attention import pick_attention
from tetrascope.models.weights import RenamingRules, rename
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.actions import Action, Kind
from tetrascope.parallel.tensor.linear import linear
from tetrascope.parallel.tensor.placement import share
from tetrascope.tools.verify.case import Case, Numbers
from tetrascope.tools.verify.layouts import Row


def planner(case: Case, layout: Layout, micro_batches: int) -> Planner:
    """The engine's planner over the case's samples."""
    infos = [SampleInfo(len(d.ids_T), int((d.weights_T[1:] > 0).sum()), d.media) for d in case.documents]
    return Planner.single(infos, 0, layout, BatchSection(samples=case.batch, micro_batches=micro_batches))


def global_batches(case: Case) -> list[list[Document]]:
    """The samples of each step, which no layout changes."""
    one = planner(case, Layout(), 1)
    return [[case.documents[draw.sample] for draw in one.plan(step).draws] for step in range(case.steps)]


@dataclass(frozen=True)
class LogitsPart:
    """Logits `[T, V/tp]` of some tokens, int64 `[T]`, of the sample at a place of the global batch, from vocabulary id
    `first` on."""

    place: int
    first: int
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class RankNumbers:
    """What one rank has of `Numbers`: every copy that it holds, replicated ones too, so that a drift shows.

    logits: of the samples it computed, last stage only.
    """

    logits: list[LogitsPart]
    losses: list[float]
    gradients: list[Shard]
    weights: list[Shard]


def run_layout(case: Case, row: Row, attention: str = "auto") -> RankNumbers:
    """One rank of a layout: the case trained with the engine's own parts."""
    family, layout, micro_batches = get_family(case.family), row.layout, row.micro_batches
    check_layout(family, case.config, layout)
    mesh = Mesh(layout, "cpu")
    device = torch.device("cpu")
    modules = family_modules(family, case.config, case.optimizer)
    pipeline = make_pipeline(family, case.config, row.parallel, modules, Workload(micro_batches))
    kernel = pick_attention(attention)[1]
    kernel = context_attention(kernel, mesh, torch.float32)
    saving = row.recompute, row.loss_rows, row.mlp_rows
    model = StageModel(family, case.config, mesh, pipeline.cut, kernel, torch.float32, modules, *saving)
    optimizer = build_optimizer(model, case.optimizer, device)
    model.load(memory_source(case.weights), optimizer)
    plans = planner(case, layout, micro_batches)
    sizes = Model(family, case.config, modules, "float32")
    schedules = StepSchedules(pipeline, sizes, layout, row.recompute, load_hardware("cpu"), None, plans.info)
    logits: list[LogitsPart] = []
    losses: list[float] = []
    gradients: list[Shard] = []
    for step in range(case.steps):
        plan = plans.plan(step)
        documents = [case.documents[draw.sample] for draw in plan.draws]
        total = float(sum(document.weights_T[1:].sum() for document in documents))
        batches = [
            collate(
                [documents[place] for place in micro.samples],
                family,
                case.config,
                micro.rows,
                layout.tp,
                mesh.index("tp"),
                mesh.first_stage,
                device,
                ContextPlace.of(mesh),
            )
            for micro in plan.micro_batches[mesh.index("dp")]
        ]
        optimizer.zero_grad()
        schedule = schedules.of(plan, mesh.index("dp"))
        with _head_outputs(model) as outputs:
            loss = forward_backward(model, schedule, batches, total)
        if step == 0:
            order = [a.micro_batch for actions in schedule for a in actions if _is_last_forward(a, model)]
            logits = _logits_by_sample(model, plan, batches, dict(zip(order, outputs, strict=False)))
        dist.all_reduce(loss)
        losses.append(loss.item())
        norm = optimizer.reduce()
        if step == 0:
            gradients = _copies(
                shard
                for group in optimizer.trained
                if group.master.grad is not None
                for _, shard in model.flat_shards(group, group.master.grad)
            )
        optimizer.step(case.optimizer.lr, norm)
    weights = _copies(
        shard
        for group in optimizer.groups
        for name in group.spans
        for shard in model.shards(name, 0, model.placed[name].param.data.view(-1))
    )
    return RankNumbers(logits, losses, gradients, weights)


@contextlib.contextmanager
def _head_outputs(model: StageModel) -> Iterator[list[Tensor]]:
    """Collects the logits of the micro-batches, in the order of their forwards; empty where the head is not."""
    outputs: list[Tensor] = []
    if not model.holds_last:
        yield outputs
        return
    last = model.chunks[model.cut.last]

    def logits(out: Tensor) -> Tensor:
        return out if model.loss_rows is None else linear(out, model.head.weight)

    handle = last.register_forward_hook(lambda module, inputs, out: outputs.append(logits(out).detach()))
    yield outputs
    handle.remove()


def _logits_by_sample(
    model: StageModel, plan: StepPlan, batches: Sequence[MicroBatch], outputs: Mapping[int, Tensor]
) -> list[LogitsPart]:
    """Cuts packed logits, by micro-batch, into samples."""
    mesh = model.mesh
    first = share(model.config.decoder.vocab, mesh.size("tp"), mesh.index("tp")).start
    found: list[LogitsPart] = []
    for m, out in outputs.items():
        for i, place in enumerate(plan.micro_batches[mesh.index("dp")][m].samples):
            rows, tokens = map(torch.from_numpy, batches[m].rows_of(i))
            found.append(LogitsPart(place, first, tokens, out[rows].clone()))
    return found


def _is_last_forward(action: Action, model: StageModel) -> bool:
    return action.kind is Kind.FORWARD and action.chunk == model.cut.last


def logits_error(parts: Sequence[LogitsPart], expected: Numbers) -> float:
    """Largest error of any logit, relative to the largest logit; infinite when one was computed by nobody."""
    scale = max(tensor.abs().max().item() for tensor in expected.logits)
    seen = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in expected.logits]
    worst = 0.0
    for part in parts:
        if not len(part.tokens):
            continue
        columns = slice(part.first, part.first + part.values.shape[1])
        wanted = expected.logits[part.place][part.tokens, columns]
        error = (part.values - wanted).abs().max().item() / scale
        worst = max(worst, error if error == error else float("inf"))
        seen[part.place][part.tokens, columns] = True
    return worst if all(mask.all() for mask in seen) else float("inf")


def _copies(found: Iterable[Shard]) -> list[Shard]:
    return [Shard(s.name, s.shape, s.offset, s.tensor.detach().clone()) for s in found]


def compare(
    parts: Sequence[Shard],
    expected: dict[str, Tensor],
    start: dict[str, Tensor] | None = None,
    yardsticks: RenamingRules = (),
) -> dict[str, float]:
    """Largest error of each logical tensor, relative to its largest element, or its yardstick's (`Case.yardsticks`).

    With `start`, relative to the largest change from it: weights after a few steps differ little from where they
    began, and only the difference says anything. Every element must be held by somebody; one that nobody holds
    counts as an infinite error.
    """
    errors = dict.fromkeys(expected, 0.0)
    seen = {
        name: torch.zeros(tensor.shape[0], tensor[0].numel(), dtype=torch.bool) for name, tensor in expected.items()
    }
    for part in parts:
        whole = expected[part.name].reshape(part.shape)
        place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.tensor.shape, strict=True))
        measure = rename(part.name, yardsticks)
        base = expected[measure] if start is None else expected[measure] - start[measure]
        scale = base.abs().max().item() or 1.0
        error = (part.tensor - whole[place]).abs().max().item() / scale if part.tensor.numel() else 0.0
        errors[part.name] = max(errors[part.name], error if error == error else float("inf"))
        seen[part.name].view(part.shape)[place] = True
    return {name: error if seen[name].all() else float("inf") for name, error in errors.items()}


def relative_losses(losses: Sequence[float], expected: Numbers) -> float:
    """Largest relative error of the losses of all steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected.losses, strict=True))
