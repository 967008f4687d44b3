"""One training step on this rank: forward and backward of its micro-batches under a pipeline schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tetrascope.engine.build import StageModel
from tetrascope.engine.data.collate import MicroBatch
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.executor import execute
from tetrascope.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from tetrascope.parallel.tensor.placement import share


def weighted_loss(model: StageModel, logits_TV: Tensor, batch: MicroBatch, total_weight: float) -> Tensor:
    """Σ weight·CE of a micro-batch / Σ weight of the global batch: the one loss rule.

    Every micro-batch, data-parallel rank and (later) context-parallel rank divides by the same global weight, so
    that their plain sums are the loss and the gradient of the whole batch.
    """
    group = model.mesh.group("tp")
    first = share(model.config.decoder.vocab, group.size(), group.rank()).start
    losses_T = vocab_parallel_cross_entropy(logits_TV, batch.labels_T, first, group)
    return (losses_T * batch.weights_T).sum() / total_weight


def forward_backward(
    model: StageModel, schedule: Schedule, batches: Sequence[MicroBatch], total_weight: float
) -> Tensor:
    """Gradients of the global loss accumulate in the flat buffers, still to be reduced over the ranks.

    Returns this rank's part of the loss, fp32 scalar: the parts of all ranks add up to it. They are zero but on the
    last stage, and there on one of the tensor-parallel ranks, which all computed the same.
    """
    mesh = model.mesh

    def forward(m: int, hidden_tH: Tensor | None) -> Tensor:
        out: Tensor = model.module(batches[m].inputs, hidden_tH)
        return weighted_loss(model, out, batches[m], total_weight) if mesh.last_stage else out

    width = model.config.decoder.hidden
    shapes = [(b.inputs.documents.total // mesh.size("tp"), width) for b in batches]
    dtype = next(iter(model.placed.values())).param.dtype
    losses = execute(schedule[mesh.index("pp")], forward, shapes, dtype, mesh, model.gradient_borders)
    if not losses or mesh.index("tp"):
        return torch.zeros((), device=mesh.device)
    return torch.stack(losses).sum()
