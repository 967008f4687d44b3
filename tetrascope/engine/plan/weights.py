"""How much a supervised token counts in the loss, by the number of supervised tokens of its sample.

`token` lets every token count the same, so that long answers dominate; `sample` every sample the same; `sqrt` lies
between the two (square averaging of InternVL 2.5, arXiv 2412.05271 §3.3).
"""

from __future__ import annotations

import math

from tetrascope.engine.config import LossWeighting


def token_weight(mode: LossWeighting, supervised: int) -> float:
    """Weight of each supervised token of a sample with so many: 1, 1/n or 1/sqrt(n)."""
    if mode == "token" or supervised == 0:
        return 1.0
    return 1 / supervised if mode == "sample" else 1 / math.sqrt(supervised)


def sample_weight(mode: LossWeighting, supervised: int) -> float:
    """Weight of a whole sample: n, 1 or sqrt(n), without the rounding of a sum; 0 when nothing is supervised."""
    if mode == "token":
        return float(supervised)
    return float(supervised > 0) if mode == "sample" else math.sqrt(supervised)
