"""ZeRO-1 AdamW against torch's own AdamW on the summed gradients, in one process, unfused and undivided."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.parallel.zero_jobs import gradients, start, zero_steps
from tetrascope.tools.verify.pool import WorkerPool

LR, STEPS = 1e-2, 4


def reference(world: int, clip: float | None) -> tuple[list[torch.Tensor], list[float]]:
    params = [nn.Parameter(value) for value in start()]
    groups = [
        {"params": [params[0], params[2]], "lr": LR, "weight_decay": 0.1},
        {"params": [params[1]], "lr": LR, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    norms = []
    for step in range(STEPS):
        parts = [gradients(step, rank) for rank in range(world)]
        for i, param in enumerate(params):
            param.grad = torch.stack([part[i] for part in parts]).sum(0)
        norms.append(torch.nn.utils.clip_grad_norm_(params, clip or float("inf")).item())
        adam.step()
    return [p.detach() for p in params], norms


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.5, 1e3], ids=["no clip", "clipped", "below the clip"])
def test_equals_torch(pool: WorkerPool, world: int, clip: float | None) -> None:
    """Bound: AdamW moves a weight by about lr whatever its gradient's size, so 1e-6 absolute is 1e-4 of a step."""
    expected, norms = reference(world, clip)
    for params, found_norms, _ in pool.run(zero_steps, STEPS, clip, torch.float32, LR, world=world):
        assert found_norms == pytest.approx(norms, rel=1e-6)
        for param, value in zip(params, expected, strict=True):
            torch.testing.assert_close(param, value, rtol=0, atol=1e-6)


def test_state_is_divided(pool: WorkerPool) -> None:
    """19 and 7 elements over 4 ranks: shares of 5 and 2 for each of two moments."""
    for _, _, sizes in pool.run(zero_steps, 1, None, torch.float32, LR, world=4):
        assert sizes == [5, 5, 2, 2]


def test_bfloat16_parameters_learn_through_fp32_masters(pool: WorkerPool) -> None:
    """Steps of 1e-4 are lost in a bf16 weight of size 1 (spacing 2⁻⁸ = 4e-3), but add up in its master.

    After 100 of them the parameters must be where fp32 training is, to bf16's rounding, and not where they began.
    """
    steps, lr = 100, 1e-4
    exact, _, _ = pool.run(zero_steps, steps, None, torch.float32, lr, world=2)[0]
    half, _, _ = pool.run(zero_steps, steps, None, torch.bfloat16, lr, world=2)[0]
    moved = max((a - b).abs().max().item() for a, b in zip(exact, start(), strict=True))
    assert moved > 3e-3
    for a, b in zip(half, exact, strict=True):
        # bf16 rounding of the result (2⁻⁹ of it), and of the gradients, which changes few of the steps' signs
        assert ((a.float() - b).abs() <= 2**-8 * b.abs() + 0.1 * moved).all()
