"""Learning-rate schedule: golden points worked out by hand from lr·(r + (1−r)·(1 + cos πp)/2)."""

from __future__ import annotations

import pytest

from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.lr import learning_rate


def rates(options: OptimizerSection, steps: int) -> list[float]:
    return [learning_rate(options, step, steps) for step in range(steps)]


def test_warm_up_then_cosine_to_the_last_step() -> None:
    # Steps 4 to 8 are the cosine: p = 0, 1/4, 1/2, 3/4, 1, and cos(π/4) = 0.70711.
    options = OptimizerSection(lr=2.0, min_lr_ratio=0.1, warmup_steps=4)
    cosine = [2.0, 2 * (0.1 + 0.9 * 0.8535534), 1.1, 2 * (0.1 + 0.9 * 0.1464466), 0.2]
    assert rates(options, 9) == pytest.approx([0.5, 1.0, 1.5, 2.0, *cosine], rel=1e-6)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(OptimizerSection(lr=3.0, min_lr_ratio=0.0), 3) == pytest.approx([3.0, 1.5, 0.0])
    assert rates(OptimizerSection(lr=3.0), 1) == [3.0]


def test_ratio_one_is_constant() -> None:
    assert rates(OptimizerSection(lr=3.0, min_lr_ratio=1.0, warmup_steps=2), 6)[1:] == pytest.approx([3.0] * 5)


def test_warm_up_longer_than_the_run() -> None:
    assert rates(OptimizerSection(lr=4.0, warmup_steps=8), 4) == [0.5, 1.0, 1.5, 2.0]


def test_past_the_last_step_the_rate_stays_at_its_least() -> None:
    options = OptimizerSection(lr=2.0, min_lr_ratio=0.1, warmup_steps=1)
    assert learning_rate(options, 12, 9) == pytest.approx(0.2)
