"""The ledger of a traced step, on steps whose times are made up, so that every part is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tetrascope.engine.trace.ledger import PARTS, ledgers, measured_costs
from tetrascope.engine.trace.record import RankTrace, StepTrace, TracedAction, read_traces
from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Schedule, to_text
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.simulator import Costs, Timeline, simulate

BEFORE, REDUCTION, OPTIMIZER, AFTER = (0.25, 0.5), 2.0, 1.0, 0.125
"""Seconds: data wait and agreement; gradient reduction, once all are through; optimizer; the rest."""


def place(stage: int, dp: int = 0) -> dict[str, int]:
    return {"pp": stage, "dp": dp, "ring": 0, "ulysses": 0, "tp": 0}


def trace_of(timeline: Timeline, schedule: Schedule) -> StepTrace:
    """A step that ran just as simulated."""
    began, ranks = sum(BEFORE), []
    all_through = began + timeline.makespan
    for stage, spans in enumerate(timeline.spans):
        free, actions = began, []
        for span in spans:
            actions.append(TracedAction(str(span.action), free, began + span.start, began + span.end))
            free = began + span.end
        reduced = all_through + REDUCTION
        ends = (BEFORE[0], began, free, reduced, reduced + OPTIMIZER, reduced + OPTIMIZER + AFTER)
        ranks.append(RankTrace(stage, place(stage), ends, tuple(actions)))
    costs: dict[str, Any] = vars(Costs([[1.0]], [[1.0]], [[1.0]]))
    return StepTrace(7, tuple(ranks), (to_text(schedule),), (costs,), vision_chunk=False)


@pytest.mark.parametrize("name", GENERATORS)
def test_equal_micro_batches_have_a_bubble_and_no_imbalance(name: str) -> None:
    schedule = GENERATORS[name](3, 5)
    costs = Costs.equal(6, 5, 1.0, 1.5, 0.5)
    timeline = simulate(schedule, costs)
    for stage, found in enumerate(ledgers(trace_of(timeline, schedule))):
        assert found.parts["bubble"] == pytest.approx(timeline.bubble[stage])
        assert found.parts["imbalance"] == pytest.approx(0)
        assert found.parts["transfer"] == pytest.approx(0)
        assert found.parts["gradient reduction"] == pytest.approx(REDUCTION)
        work = found.parts["forward"] + found.parts["backward"] + found.parts["weights"]
        assert work == pytest.approx(timeline.busy[stage])
        others = (found.parts["optimizer"], found.parts["data wait"], found.parts["other"])
        assert others == pytest.approx((OPTIMIZER, BEFORE[0], BEFORE[1] + AFTER))
        assert found.seconds == pytest.approx(sum(BEFORE) + timeline.makespan + REDUCTION + OPTIMIZER + AFTER)


def test_unequal_micro_batches_are_imbalance() -> None:
    schedule = GENERATORS["1f1b"](2, 4)
    unequal = Costs([[1, 5, 1, 1], [1, 1, 1, 5]], [[2, 2, 2, 2]] * 2, [[0, 0, 0, 0]] * 2)
    equal = Costs([[2, 2, 2, 2]] * 2, [[2, 2, 2, 2]] * 2, [[0, 0, 0, 0]] * 2)
    timeline = simulate(schedule, unequal)
    for stage, found in enumerate(ledgers(trace_of(timeline, schedule))):
        assert found.parts["bubble"] == pytest.approx(simulate(schedule, equal).bubble[stage])
        assert found.parts["bubble"] + found.parts["imbalance"] == pytest.approx(timeline.bubble[stage])
        assert found.parts["imbalance"] > 0.5


def test_a_slow_link_is_transfer() -> None:
    # Micro-batch 0 reaches stage 1 at 1.5, half a second after it was sent; its gradient stage 0 at 6. All else comes
    # while the stages work.
    schedule = GENERATORS["gpipe"](2, 2)
    fast = Costs.equal(2, 2, 1.0, 1.0, 1.0)
    slow = Costs(fast.forward, fast.backward_input, fast.backward_weight, latency=0.5)
    first, last = ledgers(trace_of(simulate(schedule, slow), schedule))
    assert (first.parts["transfer"], last.parts["transfer"]) == pytest.approx((0.5, 0.5))
    assert first.seconds == pytest.approx(last.seconds)


def test_what_comes_after_the_last_action_is_transfer() -> None:
    """The executor waits for its last sends."""
    schedule = GENERATORS["1f1b"](2, 3)
    trace = trace_of(simulate(schedule, Costs.equal(2, 3, 1.0, 1.0, 1.0)), schedule)
    first, last = trace.ranks
    late = (*first.ends[:2], *(end + 0.25 for end in first.ends[2:]))
    found, _ = ledgers(replace(trace, ranks=(replace(first, ends=late), last)))
    assert found.parts["transfer"] == pytest.approx(0.25)
    assert found.seconds == pytest.approx(late[-1])


def test_parts_add_up_to_the_step_of_each_rank() -> None:
    schedule = GENERATORS["zb-v"](2, 4)
    trace = trace_of(simulate(schedule, Costs.equal(4, 4, 1.0, 1.0, 1.0)), schedule)
    for found, rank in zip(ledgers(trace), trace.ranks, strict=True):
        assert found.parts.keys() == PARTS.keys()
        assert found.seconds == pytest.approx(rank.ends[-1])


def test_what_was_measured_can_be_simulated_again() -> None:
    schedule = GENERATORS["zb-h1"](2, 3)
    costs = Costs([[1, 2, 3], [2, 1, 1]], [[2, 2, 2], [1, 1, 1]], [[1, 1, 1], [1, 2, 1]])
    timeline = simulate(schedule, costs)
    trace = trace_of(timeline, schedule)
    again = measured_costs(schedule, [trace.pipeline(0), trace.pipeline(0)], trace.predicted(0))
    assert simulate(schedule, again).makespan == pytest.approx(timeline.makespan)


def test_a_file_reads_back(tmp_path: Path) -> None:
    schedule = GENERATORS["1f1b"](2, 4)
    trace = trace_of(simulate(schedule, Costs.equal(2, 4, 1.0, 1.0, 1.0)), schedule)
    trace.write(tmp_path)
    assert read_traces(tmp_path) == [trace]
    for step in (12, 9):
        replace(trace, step=step).write(tmp_path)
    assert [one.step for one in read_traces(tmp_path)] == [7, 9, 12]


def test_no_trace_and_a_torn_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trace a run with train --trace"):
        read_traces(tmp_path)
    (tmp_path / "step-3.json").write_text('{"step": 3, "ranks": [')
    with pytest.raises(UserError, match=r"step-3\.json: cannot be read .* trace again"):
        read_traces(tmp_path)
