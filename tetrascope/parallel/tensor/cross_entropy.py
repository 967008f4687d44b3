"""Cross-entropy over logits whose vocabulary is divided over the tensor-parallel ranks.

loss_t = log Σ_v exp(z_tv) − z_t,label. The largest logit, the sum of exponentials and the label's logit are each
reduced over the group, all in fp32; the logits themselves never travel (arXiv 1909.08053 §3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class Target:
    """Where the labels are among this rank's columns: int64 `[T]`, 0 where they are elsewhere, and bool `[T]`."""

    local_T: Tensor
    elsewhere_T: Tensor

    @classmethod
    def of(cls, labels_T: Tensor, first: int, columns: int) -> Target:
        """first: id of the first of this rank's columns."""
        local_T = labels_T - first
        elsewhere_T = (local_T < 0) | (local_T >= columns)
        return cls(local_T.masked_fill(elsewhere_T, 0), elsewhere_T)

    def logits(self, logits_TV: Tensor) -> Tensor:
        """The labels' logits `[T]`, whatever stands in column 0 where they are elsewhere."""
        return logits_TV.gather(1, self.local_T[:, None])[:, 0]

    def gradient(self, softmax_TV: Tensor, grad_T: Tensor) -> Tensor:
        """Gradient of the logits `[T, V/tp]`: (softmax − 1 at the label) · grad."""
        grad_TV = softmax_TV * grad_T[:, None]
        own_T = grad_T.masked_fill(self.elsewhere_T, 0)
        return grad_TV.scatter_add_(1, self.local_T[:, None], -own_T[:, None])


@dataclass(frozen=True)
class Normalised:
    """fp32. losses, peak (largest logit), sums (of the exponentials): `[T]`, the same on all ranks; exp: `[T, V/tp]`,
    exp(logit − peak) of this rank's columns."""

    losses_T: Tensor
    peak_T: Tensor
    sums_T: Tensor
    exp_TV: Tensor


def normalise(logits_TV: Tensor, target: Target, group: dist.ProcessGroup) -> Normalised:
    """Cross-entropy per token and what softmax is made of. Every rank of the group must call it."""
    logits = logits_TV.float()
    peak_T = logits.amax(dim=-1)
    if group.size() > 1:
        dist.all_reduce(peak_T, op=dist.ReduceOp.MAX, group=group)
    exp_TV = (logits - peak_T[:, None]).exp_()
    label_T = target.logits(logits) - peak_T
    sums_2T = torch.stack((exp_TV.sum(dim=-1), label_T.masked_fill(target.elsewhere_T, 0)))
    if group.size() > 1:
        dist.all_reduce(sums_2T, group=group)
    return Normalised(sums_2T[0].log() - sums_2T[1], peak_T, sums_2T[0], exp_TV)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, logits_TV: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        target = Target.of(labels_T, first, logits_TV.shape[1])
        found = normalise(logits_TV, target, group)
        ctx.save_for_backward(found.exp_TV / found.sums_T[:, None], target.local_T, target.elsewhere_T)
        ctx.dtype = logits_TV.dtype  # type: ignore[attr-defined]
        return found.losses_T

    @staticmethod
    def backward(ctx: FunctionCtx, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        softmax_TV, local_T, elsewhere_T = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TV = Target(local_T, elsewhere_T).gradient(softmax_TV, grad_T)
        return grad_TV.to(ctx.dtype), None, None, None  # type: ignore[attr-defined]


def vocab_parallel_cross_entropy(logits_TV: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
    """Cross-entropy per token, fp32 `[T]`, the same on every rank of the group.

    logits `[T, V/tp]`: this rank's vocabulary columns, `first` the id of the first of them; labels int64 `[T]`, all
    within the vocabulary (give unsupervised tokens weight zero, not a label outside).
    """
    return _VocabParallelCrossEntropy.apply(logits_TV, labels_T, first, group)
