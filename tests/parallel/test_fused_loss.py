"""The fused loss against whole logits: linear, then vocab-parallel cross-entropy, which the families' parity proves.

The oracle shares `normalise` with what is tested; an error there would show in every certificate. Chunks that do not
divide the rows, one chunk for all, one row a chunk; labels on every rank's columns; weights of zero. Gradients of a sum
with unequal weights, so that a row mistaken for another shows.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.tensor.collectives import gather_tokens
from tetrascope.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from tetrascope.parallel.tensor.fused_loss import linear_cross_entropy
from tetrascope.parallel.tensor.linear import WeightGradient, linear, put_off, split_backward
from tetrascope.parallel.tensor.placement import share
from tetrascope.tools.verify.pool import WorkerPool

T, H, V = 24, 16, 37


def gradients(rows: int | None, dtype: str = "float64", frozen: str = "", later: bool = False) -> list[Tensor]:
    """Losses, this rank's gradients of its rows of x and of its rows of the weights. rows: None for whole logits.
    later: under a split backward."""
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    columns = share(V, group.size(), group.rank())
    x_all = torch.randn(T, H, generator=generator, dtype=torch.float64) * 3
    weight_all = torch.randn(V, H, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=generator)
    weights = torch.rand(T, generator=generator) * (torch.arange(T) % 3 > 0)
    x = x_all.chunk(group.size())[group.rank()].to(getattr(torch, dtype)).requires_grad_(frozen != "x")
    weight = weight_all[columns.start : columns.stop].to(x.dtype).requires_grad_(frozen != "weight")
    waiting: list[WeightGradient] = []
    with split_backward() if later else torch.enable_grad():
        gathered = gather_tokens(x, group)
        if rows is None:
            losses = vocab_parallel_cross_entropy(linear(gathered, weight), labels, columns.start, group)
        else:
            losses = linear_cross_entropy(gathered, weight, labels, columns.start, group, rows)
    with put_off(waiting) if later else torch.enable_grad():
        (losses * weights).sum().backward()
    for one in waiting:
        one.compute()
    return [losses.detach(), *(torch.zeros(0) if p.grad is None else p.grad for p in (x, weight))]


def errors(rows: int, dtype: str = "float64", frozen: str = "", later: bool = False) -> list[float]:
    """Of losses and both gradients, relative to the largest element; infinite where only one of the two has one."""
    found, wanted = gradients(rows, dtype, frozen, later), gradients(None, dtype, frozen)
    return [
        ((a - b).abs().max() / b.abs().max()).item() if a.shape == b.shape and len(b) else float(len(a) + len(b))
        for a, b in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 5, 24, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_equals_whole_logits(pool: WorkerPool, ranks: int, rows: int) -> None:
    for found in pool.run(errors, rows, world=ranks):
        assert max(found) < 1e-6  # losses are in fp32


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_has_no_gradient(pool: WorkerPool, frozen: str) -> None:
    for found in pool.run(errors, 5, "float32", frozen, world=2):
        assert max(found) < 1e-6


def test_under_a_split_backward(pool: WorkerPool) -> None:
    for found in pool.run(errors, 5, "float32", later=True, world=2):
        assert max(found) < 1e-6


def test_bf16_loss_is_in_fp32(pool: WorkerPool) -> None:
    for found in pool.run(errors, 5, "bfloat16", world=2):
        assert found[0] < 1e-6
        assert max(found[1:]) < 2**-7  # one rounding to bf16 of sums taken in another order
