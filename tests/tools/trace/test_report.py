"""A traced run: what it writes, and the report made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.trace.test_ledger import trace_of
from tests.engine.train_jobs import trace_steps
from tests.tiny import write_config
from tetrascope.engine.trace.ledger import action_of, ledgers
from tetrascope.engine.trace.record import read_traces
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.simulator import Costs, simulate
from tetrascope.tools.trace.report import ledger_table, makespan, page, resimulated, write_report
from tetrascope.tools.verify.pool import WorkerPool

LAYOUTS = {
    "cost, one pipeline": (["parallel.pp=2", "parallel.schedule=cost"], 2),
    "interleaved, two pipelines": (["parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved"], 4),
    "tensor parallel": (["parallel.tp=2"], 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_traced_run(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    overrides, world = LAYOUTS[name]
    config = write_config(tmp_path, batch={"samples": 8, "micro_batches": 3 if world == 2 else 2})
    overrides = [*overrides, "model.config.decoder.layers=4", "train.steps=6"]
    pool.run(trace_steps, config, overrides, 2, world=world)
    traces = read_traces(tmp_path / "run" / "trace")
    assert [trace.step for trace in traces] == [2, 3]  # the first step is none to learn from
    for number, trace in enumerate(traces):
        assert [rank.rank for rank in trace.ranks] == list(range(world))
        for dp in range(len(trace.schedules)):
            schedule = trace.schedule(dp)
            for rank in trace.pipeline(dp):
                assert tuple(map(action_of, rank.actions)) == schedule[rank.place["pp"]]
            assert 0 < makespan(trace.pipeline(dp)) < trace.ranks[0].ends[-1]
            assert resimulated(traces, number, dp).makespan > 0
        for found, rank in zip(ledgers(trace), trace.ranks, strict=True):
            assert found.seconds == pytest.approx(rank.ends[-1])
            assert all(seconds >= -1e-9 for seconds in found.parts.values()), found
    assert ledger_table(ledgers(traces[-1])).row_count == world
    html = write_report(tmp_path / "run" / "trace").read_text()
    assert html == page(traces)
    assert html.count("<h3>measured") == 2 * len(traces[0].schedules) == html.count("<h3>predicted")
    assert "bubble" in html and "http" not in html


def test_nothing_is_written_without_a_trace(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(trace_steps, write_config(tmp_path), [], 0, world=1)
    assert not (tmp_path / "run" / "trace").exists()


def test_a_step_is_simulated_with_the_times_of_the_others() -> None:
    """Otherwise it would be told by itself."""
    schedule = GENERATORS["1f1b"](2, 3)
    times = [simulate(schedule, Costs.equal(2, 3, seconds, seconds, 0.0)) for seconds in (1.0, 2.0)]
    traces = [trace_of(timeline, schedule) for timeline in times]
    assert resimulated(traces, 0).makespan == pytest.approx(times[1].makespan)
    assert resimulated(traces, 1).makespan == pytest.approx(times[0].makespan)
    assert resimulated(traces[:1], 0).makespan == pytest.approx(times[0].makespan)
