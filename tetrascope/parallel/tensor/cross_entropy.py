"""Cross-entropy over logits whose vocabulary is divided over the tensor-parallel ranks.

loss_t = log Σ_v exp(z_tv) − z_t,label. The largest logit, the sum of exponentials and the label's logit are each
reduced over the group, all in fp32; the logits themselves never travel (arXiv 1909.08053 §3).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, logits_TV: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        logits = logits_TV.float()
        peak_T = logits.amax(dim=-1)
        if group.size() > 1:
            dist.all_reduce(peak_T, op=dist.ReduceOp.MAX, group=group)
        exp_TV = (logits - peak_T[:, None]).exp()
        local_T = labels_T - first
        elsewhere_T = (local_T < 0) | (local_T >= logits.shape[1])
        local_T = local_T.masked_fill(elsewhere_T, 0)
        label_T = logits.gather(1, local_T[:, None])[:, 0] - peak_T
        sums_2T = torch.stack((exp_TV.sum(dim=-1), label_T.masked_fill(elsewhere_T, 0)))
        if group.size() > 1:
            dist.all_reduce(sums_2T, group=group)
        ctx.save_for_backward(exp_TV / sums_2T[0][:, None], local_T, elsewhere_T)
        ctx.dtype = logits_TV.dtype  # type: ignore[attr-defined]
        return sums_2T[0].log() - sums_2T[1]

    @staticmethod
    def backward(ctx: FunctionCtx, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        softmax_TV, local_T, elsewhere_T = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TV = softmax_TV * grad_T[:, None]
        own_T = grad_T.masked_fill(elsewhere_T, 0)
        grad_TV.scatter_add_(1, local_T[:, None], -own_T[:, None])
        return grad_TV.to(ctx.dtype), None, None, None  # type: ignore[attr-defined]


def vocab_parallel_cross_entropy(logits_TV: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
    """Cross-entropy per token, fp32 `[T]`, the same on every rank of the group.

    logits `[T, V/tp]`: this rank's vocabulary columns, `first` the id of the first of them; labels int64 `[T]`, all
    within the vocabulary (give unsupervised tokens weight zero, not a label outside).
    """
    return _VocabParallelCrossEntropy.apply(logits_TV, labels_T, first, group)
