"""Output head and cross-entropy in one, a few rows at a time: the logits of a long sequence are never whole.

The forward takes logits of some rows, keeps their loss and logsumexp, and drops them; the backward computes them once
more, from which softmax and both gradients follow without another collective. That is one product with the head's
weights more than with whole logits, and `rows` instead of all rows of them at a time. (Chunks as in Liger-Kernel, arXiv
2410.10989 §3.2, which computes the gradients in the forward: a pipeline would then hold one of the size of the weights
for every micro-batch in flight.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tetrascope.parallel.tensor.cross_entropy import Target, normalise


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup, rows: int
    ) -> Tensor:
        losses, sums = [], []
        for x, labels in zip(x_TH.split(rows), labels_T.split(rows), strict=True):
            found = normalise(F.linear(x, weight_VH), Target.of(labels, first, len(weight_VH)), group)
            losses.append(found.losses_T)
            sums.append(found.peak_T + found.sums_T.log())
        ctx.save_for_backward(x_TH, labels_T, torch.cat(sums))
        ctx.weight, ctx.first, ctx.rows = weight_VH, first, rows
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TH, labels_T, logsumexp_T = ctx.saved_tensors
        weight, rows = ctx.weight, ctx.rows
        of_input, of_weight = ctx.needs_input_grad[:2]
        # Sums over many chunks: in fp32 whatever the weights are in.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        grad_x = torch.empty_like(x_TH) if of_input else None
        for start in range(0, len(x_TH), rows):
            here = slice(start, start + rows)
            softmax = F.linear(x_TH[here], weight).float().sub_(logsumexp_T[here, None]).exp_()
            target = Target.of(labels_T[here], ctx.first, len(weight))
            grad = target.gradient(softmax, grad_T[here]).to(weight.dtype)
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[here])
            if grad_weight is not None:
                grad_weight += grad.t() @ x_TH[here]
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def linear_cross_entropy(
    x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup, rows: int
) -> Tensor:
    """`vocab_parallel_cross_entropy(x·weightᵀ, labels, first, group)`, fp32 `[T]`, with logits of `rows` rows at once.

    x `[T, H]`: the head's input, gathered, the same on every rank of the group; its gradient is this rank's part of
    the sum. weight `[V/tp, H]`: this rank's rows, `first` the id of the first of them. Its gradient is not put off by
    `put_off`: it needs the same logits as that of x, and to compute them again would cost more than it gains.
    """
    losses: Tensor = _LinearCrossEntropy.apply(x_TH, weight_VH, labels_T, first, group, rows)
    return losses
