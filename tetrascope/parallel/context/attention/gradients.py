"""Sums of a rank's gradients over the blocks that it computes, in fp32 at least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.kernels import BlockKernel


def accumulator(like: Tensor, *leading: int) -> Tensor:
    """Zeros `[*leading, *shape of like]`, fp32 at least."""
    return torch.zeros(
        (*leading, *like.shape), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


class Backward:
    """The gradients of one rank's attention. `dq` `[T, N, D]` is the sum over all keys seen so far."""

    def __init__(self, kernel: BlockKernel, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        self._kernel = kernel
        self._inputs = (grad, q, out, lse)
        self.dq = accumulator(q)

    def compute(self, k: Tensor, v: Tensor, sets: tuple[BlockSet, ...]) -> Callable[[Tensor], Tensor]:
        """Computes blocks with k and v `[rows, K, D]` and adds to `dq`.

        Returns what adds the gradients of k and v to a sum `[2, rows, K, D]` and returns that: the sum may arrive from
        another rank while the blocks are computed.
        """
        grad, q, out, lse = self._inputs
        found = []
        for blocks in sets:
            dq, dk, dv = self._kernel.backward(grad, q, k, v, out, lse, blocks)
            blocks.q.add(self.dq, dq)
            found.append((blocks.k, dk, dv))

        def add_to(dkv: Tensor) -> Tensor:
            for rows, dk, dv in found:
                rows.add(dkv[0], dk)
                rows.add(dkv[1], dv)
            return dkv

        return add_to
