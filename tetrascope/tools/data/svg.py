"""A histogram as an SVG drawing that stands inside an HTML page."""

from __future__ import annotations

from html import escape

from tetrascope.tools.data.histogram import figure, histogram, summary
from tetrascope.tools.data.statistics import Measure

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 62
"""Room around the bars for title, axis labels and numbers, in pixels."""

LABELS = 6
"""Numbers along an axis, about."""


def svg(measure: Measure) -> str:
    """A histogram of the measure with title, both axes labelled with their units, and each bar's range and count shown
    where the pointer rests on it."""
    made = histogram(measure.values)
    most, bins = int(made.counts.max()), len(made.counts)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step, floor = wide / bins, HEIGHT - BOTTOM
    parts = [_text(WIDTH / 2, 20, measure.title, "title")]
    for number, count in enumerate(made.counts.tolist()):
        tall = high * count / most
        told = escape(f"{made.label(number)} {measure.unit}: {figure(count)} {measure.of}")
        parts.append(
            f'<rect x="{LEFT + number * step:.1f}" y="{floor - tall:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{tall:.1f}"><title>{told}</title></rect>'
        )
    for number in range(0, bins + 1, max(1, round(bins / LABELS))):
        x = LEFT + number * step
        parts.append(f'<line x1="{x:.1f}" y1="{floor}" x2="{x:.1f}" y2="{floor + 4}"/>')
        parts.append(_text(x, floor + 16, figure(float(made.edges[number])), "tick"))
    for count in sorted({0, most // 2, most}):
        y = floor - high * count / most
        parts.append(f'<line x1="{LEFT - 4}" y1="{y:.1f}" x2="{LEFT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 7, y + 4, figure(count), "tick left"))
    parts.append(f'<line x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}"/>')
    parts.append(f'<line x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{floor}"/>')
    parts.append(_text(LEFT + wide / 2, floor + 33, measure.unit, "axis"))
    middle = TOP + high / 2
    parts.append(_text(14, middle, measure.of, "axis", f' transform="rotate(-90 14 {middle:.1f})"'))
    parts.append(_text(WIDTH / 2, HEIGHT - 10, summary(measure.values), "tick"))
    label = escape(f"Histogram: {measure.title}, {measure.unit}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, kind: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(text)}</text>'
