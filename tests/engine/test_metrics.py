"""The log of a run that is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

from tetrascope.engine.metrics import MetricsLog


def test_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    """Steps 3 and 4 were taken but not saved, and the crash tore the line of step 5."""
    values = {"loss": 1.0, "tokens_per_second": 2.0}
    with MetricsLog(tmp_path, start=0, steps=6, active=True) as log:
        for step in range(1, 5):
            log.write(step, values)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with MetricsLog(tmp_path, start=2, steps=6, active=True) as log:
        for step in range(3, 7):
            log.write(step, values)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", start=0, steps=1, active=False) as log:
        log.write(1, {"loss": 1.0, "tokens_per_second": 2.0})
        log.say("hello")
    assert not (tmp_path / "run").exists()
