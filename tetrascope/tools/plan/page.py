"""What `tetrascope plan` found, as one HTML page that needs nothing else: no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tetrascope.engine.predict import Hardware, Prediction
from tetrascope.tools.data.preview import printable
from tetrascope.tools.plan.choices import COLUMNS, left_out, row, settings
from tetrascope.tools.plan.search import Found, Outcome
from tetrascope.tools.plan.timeline import STYLE as TIMELINE_STYLE
from tetrascope.tools.plan.timeline import draw, rows_of, seconds

STYLE = """
:root { --ink: #1c1c1c; --ground: #fff; --faint: #bbb; --idle: #ececec; --mark: #fff3cd; --bad: #a11 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --ground: #17191c; --faint: #555; --idle: #2c3035; --mark: #4a3f14; --bad: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: var(--ink);
  background: var(--ground) }
table { border-collapse: collapse } th, td { padding: .2rem .7rem; text-align: right;
  border-bottom: 1px solid var(--faint) }
.words { text-align: left } tr.chosen { background: var(--mark) }
pre { border: 1px solid var(--faint); border-radius: 6px; padding: .6rem; overflow-x: auto }
.over { color: var(--bad) } .wide { overflow-x: auto }
"""

WORDS = ("layout", "schedule", "layers")


def page(title: str, lines: Sequence[str], outcome: Outcome, chosen: int, hardware: Hardware, profile: str) -> str:
    """The page. lines: what was planned, in words; chosen: the number, from 1, of the choice that is drawn.
    profile: the name or file of the hardware."""
    found = outcome.ranked[chosen - 1]
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        f"<style>{STYLE}{TIMELINE_STYLE}</style></head><body><h1>{_safe(title)}</h1>",
        *(f"<p>{_safe(line)}</p>" for line in lines),
        _table(outcome, chosen),
        f"<section><h2>Number {chosen}: {_safe(found.pipelining)} on {_safe(found.variant.layout)}</h2>",
        f"<pre>{_safe(settings(found, profile))}</pre>",
        _step(found.prediction),
        _drawn(found),
        _memory(found.prediction, hardware),
        "</section><section><h2>Left out</h2><ul>",
        *(f"<li>{_safe(line)}</li>" for line in left_out(outcome)),
        "</ul></section></body></html>\n",
    ]
    return "\n".join(parts)


def _safe(text: object) -> str:
    return escape(printable(str(text)))


def _cells(names: Sequence[str], values: Sequence[str], tag: str) -> str:
    parts = []
    for name, value in zip(names, values, strict=True):
        marked = ' class="words"' if name in WORDS else ""
        parts.append(f"<{tag}{marked}>{_safe(value)}</{tag}>")
    return "".join(parts)


def _table(outcome: Outcome, chosen: int) -> str:
    body = ""
    for number, found in enumerate(outcome.ranked, start=1):
        marked = ' class="chosen"' if number == chosen else ""
        body += f"<tr{marked}>{_cells(COLUMNS, row(number, found), 'td')}</tr>"
    head = _cells(COLUMNS, COLUMNS, "th")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _step(one: Prediction) -> str:
    """Where the time of a step goes."""
    rows = "".join(
        f'<tr><td class="words">{_safe(name)}</td><td>{seconds(value)}</td>'
        f"<td>{100 * value / one.seconds:.1f} %</td></tr>"
        for name, value in one.breakdown.items()
    )
    total = f'<tr><th class="words">step</th><th>{seconds(one.seconds)}</th><th>100 %</th></tr>'
    return f"<h3>Where a step's time goes, mean of the stages</h3><table>{rows}{total}</table>"


def _drawn(found: Found) -> str:
    timeline = found.prediction.timeline
    title = f"Forward and backward, {seconds(timeline.makespan)}"
    return draw([(title, rows_of(timeline, found.costs))], found.prediction.candidate.cut.vision_chunk)


def _memory(one: Prediction, hardware: Hardware) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("stage", "weights", "gradients", "optimizer", "activations", "workspace", "in all, GiB")
    )
    body = []
    for stage, (held, peak) in enumerate(zip(one.memory, one.peak_bytes, strict=True)):
        active = peak - held.static - held.workspace_bytes
        sizes = (held.weight_bytes, held.gradient_bytes, held.state_bytes, active, held.workspace_bytes, peak)
        cells = "".join(f"<td>{size / 2**30:,.1f}</td>" for size in sizes)
        body.append(f"<tr><td>{stage}</td>{cells}</tr>")
    return (
        f"<h3>Memory of a rank of each stage, GiB of {hardware.memory_bytes / 2**30:,.1f}</h3>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )
