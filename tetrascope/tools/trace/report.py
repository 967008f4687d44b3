"""What a traced run did: predicted above measured, and a ledger of each rank's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from tetrascope.engine.trace.ledger import PARTS, Ledger, action_of, ledgers, measured_costs
from tetrascope.engine.trace.record import RankTrace, StepTrace, read_traces
from tetrascope.parallel.pipeline.actions import Action, Kind
from tetrascope.parallel.pipeline.simulator import Timeline, simulate
from tetrascope.tools.plan.page import STYLE as PAGE_STYLE
from tetrascope.tools.plan.timeline import STYLE as TIMELINE_STYLE
from tetrascope.tools.plan.timeline import Row, Wait, draw, rows_of, seconds


@dataclass(frozen=True)
class _Done:
    """An action of a real step, in seconds from the pipeline's start."""

    action: Action
    start: float
    end: float


def makespan(pipeline: Sequence[RankTrace]) -> float:
    """Seconds from the first action of a pipeline to the last of any stage."""
    begins = min(one.start for rank in pipeline for one in rank.actions)
    return max(one.end for rank in pipeline for one in rank.actions) - begins


def resimulated(traces: Sequence[StepTrace], number: int, dp: int = 0) -> Timeline:
    """The simulator's step with what the actions took in the other recorded steps of the same schedule.

    With a single record of the schedule, in that one.
    """
    trace = traces[number]
    same = [t for t in traces if t.schedules[dp] == trace.schedules[dp]]
    others = [t for t in same if t is not trace] or same
    schedule = trace.schedule(dp)
    return simulate(schedule, measured_costs(schedule, [t.pipeline(dp) for t in others], trace.predicted(dp)))


def ledger_table(found: Sequence[Ledger]) -> Table:
    """The ledgers for the terminal, in milliseconds."""
    table = Table(title="where a step's time went, ms", box=SIMPLE, padding=(0, 1))
    for column in ("rank", "stage", *PARTS, "step"):
        table.add_column(column, justify="right")
    for one in found:
        parts = [f"{1000 * one.parts[name]:,.1f}" for name in PARTS]
        table.add_row(str(one.rank), str(one.stage), *parts, f"{1000 * one.seconds:,.1f}")
    return table


def page(traces: Sequence[StepTrace]) -> str:
    """The report as one HTML page that needs nothing else."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>trace</title>'
        f"<style>{PAGE_STYLE}{TIMELINE_STYLE}</style></head><body><h1>Traced steps</h1>",
        "<ul>" + "".join(f"<li>{escape(name)}: {escape(what)}</li>" for name, what in PARTS.items()) + "</ul>",
    ]
    for number, trace in enumerate(traces):
        parts.append(f"<section><h2>Step {trace.step}</h2>")
        parts += [_timelines(traces, number, dp) for dp in range(len(trace.schedules))]
        parts.append(_ledgers(ledgers(trace)) + "</section>")
    return "\n".join([*parts, "</body></html>\n"])


def write_report(folder: Path) -> Path:
    """Writes `report.html` beside a folder's traces. Raises UserError when there are none."""
    path = folder / "report.html"
    path.write_text(page(read_traces(folder)), encoding="utf-8")
    return path


def _timelines(traces: Sequence[StepTrace], number: int, dp: int) -> str:
    trace = traces[number]
    predicted = simulate(trace.schedule(dp), trace.predicted(dp))
    again = resimulated(traces, number, dp)
    pipeline = trace.pipeline(dp)
    shown = [
        (f"predicted from the machine's profile, {seconds(predicted.makespan)}", predicted),
        (f"simulated with the times of the recorded actions, {seconds(again.makespan)}", again),
    ]
    drawn: list[tuple[str, Sequence[Row]]]
    drawn = [(title, rows_of(timeline, trace.predicted(dp))) for title, timeline in shown]
    drawn.append((f"measured, {seconds(makespan(pipeline))}", [_row(rank, pipeline) for rank in pipeline]))
    return f"<h3>data-parallel rank {dp}</h3>{draw(drawn, trace.vision_chunk)}"


def _row(rank: RankTrace, pipeline: Sequence[RankTrace]) -> Row:
    zero = min(one.start for other in pipeline for one in other.actions)
    row: list[_Done | Wait] = []
    for one in rank.actions:
        action = action_of(one)
        if action.kind is not Kind.BACKWARD_WEIGHT and one.start > max(one.asked, zero):
            row.append(Wait("transfer", max(one.asked - zero, 0.0), one.start - zero))
        row.append(_Done(action, one.start - zero, one.end - zero))
    return row


def _ledgers(found: Sequence[Ledger]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("rank", "stage", *PARTS, "step"))
    rows = "".join(
        f"<tr><td>{one.rank}</td><td>{one.stage}</td>"
        + "".join(f"<td>{seconds(one.parts[name])}</td>" for name in PARTS)
        + f"<td>{seconds(one.seconds)}</td></tr>"
        for one in found
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
