"""The linear layer, whose gradient of the weights can be put off (arXiv 2401.10241 §2).

Under `split_backward()` linears keep what they need so that, under `put_off(waiting)`, a backward computes gradients of
inputs only and leaves those of weights in `waiting`. Norms, biases and embeddings get their gradients at once, and so
does an output head that computes loss and gradients in one (fused_loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of a weight `[out, in]`, still to be computed: gradientᵀ·input, `[T, out]` and `[T, in]`."""

    weight: Tensor
    input: Tensor
    gradient: Tensor

    def compute(self) -> None:
        """Accumulates the gradient in the weight, as a backward would."""
        torch.autograd.backward(self.weight, self.gradient.t() @ self.input)


class _State:
    """Global, not of a thread: on GPUs backwards run in threads of autograd's own."""

    splits = False
    waiting: list[WeightGradient] | None = None


@contextmanager
def split_backward() -> Iterator[None]:
    """Forwards inside it may have their backward in two parts."""
    before, _State.splits = _State.splits, True
    try:
        yield
    finally:
        _State.splits = before


@contextmanager
def put_off(waiting: list[WeightGradient]) -> Iterator[None]:
    """Backwards inside it append to `waiting` what they would have computed for the weights of linears."""
    before, _State.waiting = _State.waiting, waiting
    try:
        yield
    finally:
        _State.waiting = before


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only the weight's gradient needs the input; a frozen weight has none.
        ctx.save_for_backward(*[x] if ctx.needs_input_grad[1] else [])  # type: ignore[attr-defined]
        ctx.weight = weight  # type: ignore[attr-defined]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        weight: Tensor = ctx.weight  # type: ignore[attr-defined]
        of_input, of_weight, of_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        rows = grad.flatten(0, -2)
        grad_weight = None
        if of_weight:
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            later = WeightGradient(weight, x.flatten(0, -2), rows)
            if _State.waiting is None:
                grad_weight = later.gradient.t() @ later.input
            else:
                _State.waiting.append(later)
        return grad @ weight if of_input else None, grad_weight, rows.sum(0) if of_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias: `[..., in]`, `[out, in]` -> `[..., out]`."""
    if _State.splits:
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)
