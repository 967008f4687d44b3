"""Linears whose gradient of the weights is put off: nothing else changes, and nothing is computed before it is asked
for."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tetrascope.parallel.tensor.linear import WeightGradient, linear, put_off, split_backward


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.randn(4, generator=generator))


def loss_of(out: Tensor) -> Tensor:
    return out.tanh().sum()


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (0, 3)])
@pytest.mark.parametrize("again", [False, True], ids=["", "recomputed"])
def test_both_parts_together_are_the_whole(shape: tuple[int, ...], again: bool) -> None:
    weight, bias = parameters()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = torch.autograd.grad(loss_of(F.linear(x, weight, bias)), (x, weight, bias))
    waiting: list[WeightGradient] = []
    with split_backward():
        out = checkpoint(linear, x, weight, bias, use_reentrant=False) if again else linear(x, weight, bias)
        with put_off(waiting):
            loss_of(out).backward()
    assert weight.grad is None and x.grad is not None and bias.grad is not None
    for one in waiting:
        one.compute()
    assert weight.grad is not None
    for found, wanted in zip((x.grad, weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_work_is_divided_evenly() -> None:
    # 2·rows·in·out for the output, as much for the input's gradient, as much for the weight's.
    weight, bias = parameters()
    x, waiting = torch.randn(5, 3, requires_grad=True), list[WeightGradient]()
    counters = [FlopCounterMode(display=False) for _ in range(3)]
    with split_backward(), put_off(waiting):
        with counters[0]:
            out = linear(x, weight, bias)
        with counters[1]:
            loss_of(out).backward()
        with counters[2]:
            waiting[0].compute()
    assert [counter.get_total_flops() for counter in counters] == [2 * 5 * 3 * 4] * 3


def test_hooks_see_the_gradient_when_it_is_there() -> None:
    weight, _ = parameters()
    seen: list[Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad))
    waiting: list[WeightGradient] = []
    with split_backward(), put_off(waiting):
        loss_of(linear(torch.ones(2, 3), weight)).backward()
    assert all(grad is None for grad in seen)
    waiting[0].compute()
    assert seen[-1] is not None


def test_a_frozen_weight_has_nothing_to_wait_for() -> None:
    weight, _ = parameters()
    weight.requires_grad_(False)
    x, waiting = torch.ones(2, 3, requires_grad=True), list[WeightGradient]()
    with split_backward(), put_off(waiting):
        loss_of(linear(x, weight)).backward()
    assert waiting == [] and x.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_only_a_weight_that_is_trained_keeps_the_input(frozen: bool) -> None:
    weight, bias = parameters()
    weight.requires_grad_(not frozen)
    given = torch.ones(2, 3, requires_grad=True)
    with split_backward():
        hidden = given + 1
        kept = weakref.ref(hidden.untyped_storage())
        out = linear(hidden, weight, bias)
        del hidden
    assert (kept() is None) == frozen
    loss_of(out).backward()
    assert given.grad is not None


def test_without_split_backward_nothing_waits() -> None:
    weight, bias = parameters()
    waiting: list[WeightGradient] = []
    with put_off(waiting):
        loss_of(linear(torch.ones(2, 3), weight, bias)).backward()
    assert waiting == [] and weight.grad is not None
