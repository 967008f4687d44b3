"""Figures of a benchmark from a measurement that was made up, so that each of them is known."""

from __future__ import annotations

import pytest

from tetrascope.engine.trainer import StepStats
from tetrascope.tools.bench.measure import Measurement
from tetrascope.tools.bench.report import summarise


def step(tokens: int, images: int, vision: float, language: float) -> StepStats:
    return StepStats(
        loss=1.0,
        grad_norm=1.0,
        lr=1e-3,
        tokens=tokens,
        images=images,
        skipped=0,
        vision_flops=vision,
        language_flops=language,
        seconds=99.0,  # the trainer's own clock leaves out what lies between steps: not to be used
        data_wait=99.0,  # rank 0's alone
    )


def test_rates_are_totals_over_total_time() -> None:
    measurement = Measurement(
        steps=[step(100, 5, 1e9, 3e9), step(300, 7, 2e9, 6e9), step(200, 0, 0.0, 4e9)],
        seconds=[1.0, 3.0, 4.0],
        data_wait=[0.5, 0.0, 1.5],
        memory=[70, 30, 50],
        peak=[4e9, 6e9],
    )
    report = summarise(measurement, warmup=2)
    assert (report.warmup, report.steps) == (2, 3)
    assert report.tokens_per_second == pytest.approx(600 / 8)
    assert report.images_per_second == pytest.approx(12 / 8)
    assert report.tokens_per_step == pytest.approx(200)
    assert report.images_per_step == pytest.approx(4)
    assert report.step_seconds == [1.0, 3.0, 4.0]
    # Linear between the order statistics: the 10th of 3 values lies 0.2 of the way from the first to the second.
    assert report.step_seconds_p10 == pytest.approx(1.4)
    assert report.step_seconds_median == pytest.approx(3.0)
    assert report.step_seconds_p90 == pytest.approx(3.8)
    assert report.data_wait_share == pytest.approx(2 / 8)
    assert report.vision_flops_per_step == pytest.approx(1e9)
    assert report.language_flops_per_step == pytest.approx(13e9 / 3)
    assert report.vision_flops_per_second == pytest.approx(3e9 / 8)
    assert report.language_flops_per_second == pytest.approx(13e9 / 8)
    assert report.flops_per_second == pytest.approx(2e9)
    assert report.peak_flops_per_second == pytest.approx(10e9)
    assert report.peak_flops_per_second_by_rank == [4e9, 6e9]
    assert report.mfu == pytest.approx(0.2)
    assert (report.memory_min, report.memory_max, report.memory_by_rank) == (30, 70, [70, 30, 50])
