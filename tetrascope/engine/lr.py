"""Learning-rate schedule."""

from __future__ import annotations

import math

from tetrascope.engine.config import OptimizerSection


def learning_rate(options: OptimizerSection, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from lr to lr·min_lr_ratio at the last of `steps`.

    `step` counts from 0; the first step already moves, with lr / warmup_steps.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    span = max(1, steps - 1 - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.lr * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * cosine)
