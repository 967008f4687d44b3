"""Which steps are timed, and what is taken from which rank, with a trainer whose steps only take time."""

from __future__ import annotations

import pytest

from tests.tools.bench.measure_jobs import STEP_SECONDS, WARMUP_SECONDS, measure_scripted
from tetrascope.tools.verify.pool import WorkerPool


def test_warm_up_is_taken_but_not_timed(pool: WorkerPool) -> None:
    ranks = pool.run(measure_scripted, 2, 3, world=2)
    for measurement, stops, announced in ranks:
        assert stops == [None] * 5
        assert announced == 5
        assert [step.tokens for step in measurement.steps] == [3, 4, 5]
        assert len(measurement.seconds) == 3
        assert min(measurement.seconds) >= STEP_SECONDS
        assert min(measurement.seconds) < WARMUP_SECONDS
        assert measurement.data_wait == pytest.approx([1.03, 1.04, 1.05])  # rank 1's, who waits longer
        assert len(measurement.memory) == len(measurement.peak) == 2
    first, second = (measurement for measurement, _, _ in ranks)
    assert (first.memory, first.peak) == (second.memory, second.peak)
