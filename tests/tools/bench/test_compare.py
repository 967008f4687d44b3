"""The comparison with transformers compares the same thing.

Both sides start from the same weights and see the same samples, so that the losses of the first steps must agree; a
side that computed less would show there. Times are not tested but for one bound with room to spare: on samples of
unequal lengths the other side computes several times as many rows.
"""

from __future__ import annotations

import statistics

import pytest

from tetrascope.errors import UserError
from tetrascope.tools.bench.compare import compare


def test_both_sides_compute_the_same_loss() -> None:
    found = {one.batch: one for one in compare("qwen2_vl", "0.5M", pairs=3, warmup=0)}
    assert set(found) == {"packed", "unequal"}
    for one in found.values():
        # Means over some hundred tokens in fp32; measured 1e-7.
        assert one.losses[0] == pytest.approx(one.losses[1], rel=1e-5)
        assert 0.4e6 < one.parameters < 20e6
        assert len(one.ours) == len(one.theirs) == len(one.ratios) == 3
    assert statistics.median(found["unequal"].ratios) > 1.3  # measured about 4


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(UserError, match=r"--sizes: unknown '7T'; choose from 0\.5M, 5M, 20M"):
        compare("qwen2_vl", "7T", pairs=1)
    with pytest.raises(UserError, match="bench compare: nothing has no batches"):
        compare("nothing", "0.5M", pairs=1)
