"""Whether a kernel does what the formulas say on this device: a small pack, before a run trusts it.

The packages behind GPU kernels change their arguments and layouts between versions; a wrong one of either would train,
and train badly.
"""

from __future__ import annotations

import torch

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.kernels import BlockKernel, Reference
from tetrascope.parallel.context.tokens import Block

SQUARES = BlockSet((Block(0, 100, 0, 100, True), Block(130, 62, 130, 62, True)), True)
RECTANGLES = BlockSet((Block(0, 100, 40, 77, False), Block(120, 72, 120, 33, False)), False)
ROWS, HEADS, KV_HEADS, WIDTH = 192, 4, 2, 64

BOUND = 0.05
"""Largest difference, of the largest element: several roundings of a half precision (2⁻⁸), far below any mistake."""


def check_kernel(name: str, kernel: BlockKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError when the kernel's output, logsumexp or gradients are not those of the reference."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(ROWS, heads, WIDTH, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    out = torch.randn(ROWS, HEADS, WIDTH, generator=generator).to(device, dtype)  # of the whole, not of these blocks
    lse = torch.full((ROWS, HEADS), 7.0, device=device)
    for blocks in (SQUARES, RECTANGLES):
        try:
            found = (*kernel.forward(q, k, v, blocks), *kernel.backward(grad, q, k, v, out, lse, blocks))
        except Exception as error:
            raise UserError(
                f"kernels.context: {name} failed on a small pack on {device} ({type(error).__name__}: {error}); "
                "install another version of its package, or name another kernel"
            ) from error
        reference = Reference()
        expected = (*reference.forward(q, k, v, blocks), *reference.backward(grad, q, k, v, out, lse, blocks))
        for what, ours, theirs in zip(("output", "logsumexp", "dq", "dk", "dv"), found, expected, strict=True):
            off = (ours.float() - theirs.float()).abs().max().item() if ours.shape == theirs.shape else float("inf")
            if not off <= BOUND * theirs.abs().max().item():
                raise UserError(
                    f"kernels.context: {name} gives another {what} than the formula on {device}, off by {off:.2g}; "
                    "install another version of its package, or name another kernel"
                )
