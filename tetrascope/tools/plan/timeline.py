"""Timelines of a pipeline as drawings for an HTML page: a row for each stage, a bar for each action.

Several timelines come one above the other on one scale, such as a prediction above what was measured. No script, no
other file; readable on a light and on a dark ground.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule, name
from tetrascope.parallel.pipeline.simulator import Costs, Timeline

NARROWEST, WIDEST = 1000, 9000
"""Pixels of a drawing's time axis; in between, half of all bars are at least READABLE wide."""

READABLE = 15.0
"""Pixels that a bar needs for its micro-batch's number."""

BAR, STEP, AXIS = 20, 25, 24
"""Height of a bar, of a row and of the axis, in pixels."""

TICKS = 10
"""Numbers along the axis, about."""

KINDS = {
    "vision": "vision forward",
    "vision-back": "vision backward",
    "F": "forward",
    "B": "backward",
    "I": "backward, gradient of the input",
    "W": "backward, gradients of the weights",
    "transfer": "waiting for a transfer",
    "data": "waiting for data",
}
"""Kind of bar -> what the legend calls it; also its class in the style sheet."""

STYLE = """
.timeline { display: flex; align-items: flex-start; margin: .3rem 0 } .timeline .scroll { overflow-x: auto; flex: 1 }
.timeline svg { display: block } .timeline text { font: 11px system-ui, sans-serif; fill: var(--ink, #222) }
.timeline rect.ground { fill: var(--idle, #ececec) } .timeline line { stroke: var(--faint, #999) }
.timeline .number { text-anchor: middle; pointer-events: none; fill: #111 } .timeline .tick { text-anchor: middle }
.timeline .stage { text-anchor: end }
.legend span { display: inline-block; margin-right: 1.2em } .legend i { display: inline-block; width: 1em; height: 1em;
  margin-right: .4em; border-radius: 2px; vertical-align: -.15em }
.vision { fill: #f2b134; background: #f2b134 } .vision-back { fill: #d9822b; background: #d9822b }
.F { fill: #7fb2e5; background: #7fb2e5 } .B { fill: #6cbf84; background: #6cbf84 }
.I { fill: #a5d6a7; background: #a5d6a7 } .W { fill: #c8a2d6; background: #c8a2d6 }
.transfer { fill: #e57373; background: #e57373 } .data { fill: #8d6e63; background: #8d6e63 }
"""
"""Of the drawings; a page may set --ink, --idle and --faint for a dark ground."""


class SpanLike(Protocol):
    """When an action ran, in seconds from the start of the step: `simulator.Span`, or one that was measured."""

    @property
    def action(self) -> Action: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


@dataclass(frozen=True)
class Wait:
    """A time in which a stage waited for something that can be named: "transfer" or "data"; seconds."""

    kind: str
    start: float
    end: float


Row = Sequence[SpanLike | Wait]
"""What one stage did."""


def draw(timelines: Sequence[tuple[str, Sequence[Row]]], vision_chunk: bool = False) -> str:
    """HTML of timelines, each a title and the rows of its stages, one above the other on one scale.

    vision_chunk: whether chunk 0 is the vision encoder, whose actions have colours of their own. At the right, each
    stage's share of its timeline's length that is spent in no action. STYLE belongs to it.
    """
    length = max((one.end for _, rows in timelines for row in rows for one in row), default=0.0) or 1.0
    width = _width([one.end - one.start for _, rows in timelines for row in rows for one in row], length)
    parts = [_legend(timelines, vision_chunk)]
    for title, rows in timelines:
        parts.append(f"<h3>{escape(title)}</h3>")
        parts.append(_drawing(rows, length, width, vision_chunk))
    return "\n".join(parts)


def rows_of(timeline: Timeline, costs: Costs) -> list[list[SpanLike | Wait]]:
    """The rows of a simulated step, with the waits that its transfers cause.

    A stage waits for a transfer, rather than for another stage's work, while what its next action needs is on its way.
    """
    schedule: Schedule = tuple(tuple(span.action for span in spans) for spans in timeline.spans)
    graph = Graph(schedule)
    rows: list[list[SpanLike | Wait]] = []
    for stage, spans in enumerate(timeline.spans):
        row: list[SpanLike | Wait] = []
        free = 0.0
        for span in spans:
            travels = any(graph.place[need][0] != stage for need in graph.needs(span.action))
            sent = span.start - costs.transfer(span.action.micro_batch)
            if travels and (begins := max(free, sent)) < span.start:
                row.append(Wait("transfer", begins, span.start))
            row.append(span)
            free = span.end
        rows.append(row)
    return rows


def idle_share(row: Row, length: float) -> float:
    """Share of `length` seconds in which a stage does no action, 0 to 1."""
    busy = math.fsum(one.end - one.start for one in row if not isinstance(one, Wait))
    return 1 - busy / length if length else 0.0


def _width(durations: Sequence[float], length: float) -> float:
    """Pixels of the time axis."""
    typical = statistics.median([d for d in durations if d > 0] or [length])
    return min(max(READABLE * length / typical, NARROWEST), WIDEST)


def _kind(one: SpanLike | Wait, vision_chunk: bool) -> str:
    if isinstance(one, Wait):
        return one.kind
    if vision_chunk and one.action.chunk == 0:
        return "vision" if one.action.kind is Kind.FORWARD else "vision-back"
    return one.action.kind.value


def _legend(timelines: Sequence[tuple[str, Sequence[Row]]], vision_chunk: bool) -> str:
    there = {_kind(one, vision_chunk) for _, rows in timelines for row in rows for one in row}
    marks = "".join(f'<span><i class="{k}"></i>{KINDS[k]}</span>' for k in KINDS if k in there)
    return f'<p class="legend">{marks}</p>'


def _drawing(rows: Sequence[Row], length: float, width: float, vision_chunk: bool) -> str:
    """Names of the stages, what they do, and their bubbles: three drawings side by side, of which the middle one can
    be wider than the page."""
    own = max((one.end for row in rows for one in row), default=0.0)
    height = STEP * len(rows) + AXIS
    names = "".join(f'<text class="stage" x="60" y="{_base(s)}">stage {s}</text>' for s in range(len(rows)))
    bars = "".join(part for s, row in enumerate(rows) for part in _bars(row, s, own, width / length, vision_chunk))
    shares = "".join(
        f'<text x="6" y="{_base(s)}">{100 * idle_share(row, own):.1f} %</text>' for s, row in enumerate(rows)
    )
    shares += f'<text x="6" y="{height - 6}">bubble</text>'
    return (
        f'<div class="timeline"><svg width="66" height="{height}">{names}</svg>'
        f'<div class="scroll"><svg width="{width + 20:.0f}" height="{height}">{bars}'
        f"{_axis(length, width, height - AXIS)}</svg></div>"
        f'<svg width="56" height="{height}">{shares}</svg></div>'
    )


def _base(stage: int) -> int:
    """Where the text of a row stands."""
    return STEP * stage + BAR - 6


def _bars(row: Row, stage: int, own: float, scale: float, vision_chunk: bool) -> Iterator[str]:
    top = STEP * stage
    yield f'<rect class="ground" x="0" y="{top}" width="{own * scale:.1f}" height="{BAR}"/>'
    for one in row:
        x, wide = one.start * scale, (one.end - one.start) * scale
        if wide <= 0:
            continue
        kind = _kind(one, vision_chunk)
        what = KINDS[kind] if isinstance(one, Wait) else _told(one.action, stage, KINDS[kind])
        told = f"{what}: {seconds(one.start)} to {seconds(one.end)}, {seconds(one.end - one.start)}"
        yield (
            f'<rect class="{kind}" x="{x:.1f}" y="{top}" width="{max(wide - 0.4, 0.3):.1f}" height="{BAR}">'
            f"<title>{escape(told)}</title></rect>"
        )
        if not isinstance(one, Wait) and wide >= 7 * len(str(one.action.micro_batch)) + 2:
            yield f'<text class="number" x="{x + wide / 2:.1f}" y="{_base(stage)}">{one.action.micro_batch}</text>'


def _told(action: Action, stage: int, what: str) -> str:
    return f"{name(action, stage)}, {what} of micro-batch {action.micro_batch}, chunk {action.chunk}"


def _axis(length: float, width: float, top: float) -> str:
    """A line with round numbers of seconds below."""
    exponent = math.floor(math.log10(length / TICKS))
    step = next(s for s in (10.0**exponent * k for k in (1, 2, 5, 10)) if length / s <= TICKS)
    parts = [f'<line x1="0" y1="{top}" x2="{width:.1f}" y2="{top}"/>']
    for number in range(int(length / step + 1e-9) + 1):
        x = number * step / length * width
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 4}"/>')
        anchor = ' style="text-anchor: start"' if number == 0 else ""
        parts.append(f'<text class="tick"{anchor} x="{x:.1f}" y="{top + 16}">{seconds(number * step)}</text>')
    return "".join(parts)


def seconds(value: float) -> str:
    """A time with a unit that suits it: 1.25 s, 31.4 ms, 7.0 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value / 1e-6:.3g} µs" if value else "0 s"
