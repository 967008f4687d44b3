"""The three differentiable collectives of tensor parallelism. Rows are tokens; a group of one does nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tetrascope.parallel.primitives import all_gather, reduce_scatter


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    all_gather(out, x.contiguous(), group)
    return out


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    reduce_scatter(out, x.contiguous(), group)
    return out


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce_scatter(grad, ctx.group), None  # type: ignore[attr-defined]


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_gather(grad, ctx.group), None  # type: ignore[attr-defined]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_reduce(grad, ctx.group), None  # type: ignore[attr-defined]


def gather_tokens(x_tH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[T/tp, H]` -> `[T, H]`, the ranks' rows in rank order. Backward: sum of the ranks' gradients, own rows."""
    return x_tH if group.size() == 1 else _GatherTokens.apply(x_tH, group)


def scatter_sum(x_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums `[T, H]` -> own rows `[T/tp, H]` of the total. Backward: gather. T must divide by the group."""
    return x_TH if group.size() == 1 else _ScatterSum.apply(x_TH, group)


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums -> the total on every rank, where each rank then uses a part of it.

    Backward: sum of the ranks' gradients, since each holds the part that came from its own use.
    """
    return x if group.size() == 1 else _Sum.apply(x, group)
