"""One training step on this rank: forward and backward of its micro-batches under a pipeline schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tetrascope.engine.build import StageModel
from tetrascope.engine.data.collate import MicroBatch
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.executor import Payload, execute
from tetrascope.parallel.pipeline.recorder import Recorder
from tetrascope.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from tetrascope.parallel.tensor.fused_loss import linear_cross_entropy
from tetrascope.parallel.tensor.placement import share


def weighted_loss(model: StageModel, out: Tensor, batch: MicroBatch, total_weight: float) -> Tensor:
    """Σ weight·CE of a micro-batch / Σ weight of the global batch: the one loss rule.

    out: what the last chunk gives, logits or the head's input (`StageModel.run`). Every micro-batch, data-parallel rank
    and context-parallel rank divides by the same global weight, so that their plain sums are the loss and the gradient
    of the whole batch.
    """
    group = model.mesh.group("tp")
    first = share(model.config.decoder.vocab, group.size(), group.rank()).start
    if model.loss_rows is None:
        losses_T = vocab_parallel_cross_entropy(out, batch.labels_T, first, group)
    else:
        losses_T = linear_cross_entropy(out, model.head.weight, batch.labels_T, first, group, model.loss_rows)
    return (losses_T * batch.weights_T).sum() / total_weight


def forward_backward(
    model: StageModel,
    schedule: Schedule,
    batches: Sequence[MicroBatch],
    total_weight: float,
    recorder: Recorder | None = None,
) -> Tensor:
    """Gradients of the global loss accumulate in the flat buffers, still to be reduced over the ranks.

    Returns this rank's part of the loss, fp32 scalar: the parts of all ranks add up to it. They are zero but on the
    stage with the last chunk, and there on one of the tensor-parallel ranks, which all computed the same.
    """
    mesh = model.mesh

    def compute(chunk: int, m: int, given: Payload) -> tuple[Payload, Tensor | None]:
        made = model.run(chunk, batches[m].inputs, given)
        if chunk < model.cut.last:
            return made, None
        return (), weighted_loss(model, made[0], batches[m], total_weight)

    width = model.config.decoder.hidden
    shapes = [(b.inputs.documents.total // mesh.size("tp"), width) for b in batches]
    dtype = next(iter(model.placed.values())).param.dtype
    losses = execute(schedule, compute, shapes, dtype, mesh, recorder)
    if not losses or mesh.index("tp"):
        return torch.zeros((), device=mesh.device)
    return torch.stack(losses).sum()
