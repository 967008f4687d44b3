"""Features from the ranks that encoded them to the ranks that own their tokens, and gradients back.

One all-to-all with unequal parts each way, whatever the number of tensors. Everything about it is known beforehand
(`FeatureRoute`): no sizes are exchanged. The backward is the same all-to-all with sending and receiving exchanged, so
that every feature's gradient arrives where it was computed; nothing is lost when owner and encoder differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_SH: Tensor,
        anchor: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.route = send_counts, receive_counts, group  # type: ignore[attr-defined]
        return _send(x_SH, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        send_counts, receive_counts, group = ctx.route  # type: ignore[attr-defined]
        return _send(grad_RH, receive_counts, send_counts, group), None, None, None, None


def _send(x_SH: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = x_SH.new_empty((sum(receive_counts), *x_SH.shape[1:]))
    dist.all_to_all_single(out, x_SH.contiguous(), list(receive_counts), list(send_counts), group=group)
    return out


def all_to_all_rows(
    x_SH: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
    gradients: bool = True,
) -> Tensor:
    """`[S, …]`, rows for rank 0 first, -> `[R, …]`, rows of rank 0 first. Any of the counts may be 0.

    Every rank of the group must call it, with trailing dimensions and dtype alike. gradients: whether the backward
    runs, the same on all ranks, whether or not a rank's own x requires one. Then the result has to take part in the
    loss on every rank, also where it is empty (`index_copy` of no rows does): a rank that left it out would be
    waited for. A rank whose x requires no gradient drops the one it gets.
    """
    if sum(send_counts) != len(x_SH):
        raise ValueError(f"{len(x_SH)} rows to send, but counts of {sum(send_counts)}")
    if not gradients:
        return _send(x_SH.detach(), send_counts, receive_counts, group)
    # A rank that has encoded nothing has no tensor that requires a gradient; this one brings it into the backward.
    anchor = x_SH.new_zeros(0).requires_grad_()
    return _AllToAll.apply(x_SH, anchor, send_counts, receive_counts, group)


def exchange_features(
    features: Sequence[Tensor],
    send_rows: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup,
    gradients: bool = True,
) -> list[Tensor]:
    """What this rank's encoder gave, several tensors `[F, H]`, -> as many of what its tokens need, `[received, H]`.

    send_rows: int64 `[S]` on the features' device, and counts: see `FeatureRoute`; `FeatureRoute.picks_CM` tells what
    becomes of the result. Rows of features that send_rows does not name (padding) are left out. A rank that has
    encoded nothing passes empty tensors `[0, H]`, as many as the others. gradients: see `all_to_all_rows`.
    """
    together_SH = torch.cat([one_FH.index_select(0, send_rows) for one_FH in features], dim=1)
    widths = [one_FH.shape[1] for one_FH in features]
    return list(all_to_all_rows(together_SH, send_counts, receive_counts, group, gradients).split(widths, dim=1))
