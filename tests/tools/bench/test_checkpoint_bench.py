"""The measurement of saves: what it times, on a model so small that nothing is said about speed."""

from __future__ import annotations

import pytest

from tetrascope.tools.bench.checkpoint import SaveTimes, main


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--size", "0.5M", "--pairs", "2"]) == 0
    out = capsys.readouterr().out
    for row in ("synchronous save", "asynchronous save: stall", "in the background", "training step alone"):
        assert row in out
    assert "stall / synchronous save" in out and "parameters" in out


def test_ratios_are_of_pairs() -> None:
    times = SaveTimes(1, 1, 0.0, wait=[1.0, 2.0], stall=[0.5, 0.2], write=[], step=[], step_beside=[])
    assert times.ratios == [0.1, 0.5]
