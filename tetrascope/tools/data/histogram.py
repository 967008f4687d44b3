"""Histograms with round bounds, and how they look in a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from tetrascope.tools.data.statistics import Measure

BINS = 16
"""About as many bars as a histogram has."""

WIDE = 100.0
"""Where the largest value is so many times the median of those above 0, bins grow by 1, 2, 5, 10, ..."""

BAR = 40
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Histogram:
    """edges: float64 `[bins + 1]`, rising; a bin holds its lower edge and not its upper one. counts: int64 `[bins]`.

    whole: whether the values are whole numbers.
    """

    edges: np.ndarray
    counts: np.ndarray
    whole: bool

    def label(self, number: int) -> str:
        """What a bin holds: one whole number, or a range with both of its ends (the upper one left out if not
        whole)."""
        low, high = float(self.edges[number]), float(self.edges[number + 1])
        if self.whole:
            return figure(low) if high - low <= 1 else f"{figure(low)}–{figure(high - 1)}"
        return f"{figure(low)}–{figure(high)}"


def histogram(values: np.ndarray, bins: int = BINS) -> Histogram:
    """A histogram of at least one value, none negative, with about `bins` bins."""
    whole = bool((values == np.floor(values)).all())
    low, high = float(values.min()), float(values.max())
    above = values[values > 0]
    if len(above) and high > WIDE * float(np.median(above)):
        edges = _growing(float(above.min()), high, low)
    else:
        step = _round_step((high - low) / bins, whole)
        first = math.floor(low / step)
        edges = np.arange(first, math.floor(high / step) + 2) * step
    return Histogram(edges, np.histogram(values, edges)[0], whole)


def _round_step(at_least: float, whole: bool) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not smaller."""
    if at_least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(at_least))
    step = next(k * power for k in (1, 2, 2.5, 5, 10, 20) if k * power >= at_least * (1 - 1e-12))
    return float(max(1, math.ceil(step))) if whole else step


def _growing(smallest: float, high: float, low: float) -> np.ndarray:
    """1, 2, 5, 10, ... from below the smallest positive value to above the largest, with 0 before them if needed."""
    edges = [0.0] if low <= 0 else []
    power = math.floor(math.log10(smallest))
    while not edges or edges[-1] <= high:
        steps = [k * 10.0**power for k in (1, 2, 5)]
        edges += [
            edge for edge, after in zip(steps, [*steps[1:], 10.0 ** (power + 1)], strict=True) if after > smallest
        ]
        power += 1
    last = next(i for i, edge in enumerate(edges) if edge > high)
    return np.array(edges[: last + 1])


def figure(value: float) -> str:
    """A number short enough for an axis."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}"


def summary(values: np.ndarray) -> str:
    """Least, middle, mean, 95th percentile and most."""
    middle, late = np.percentile(values, [50, 95])
    named = {"min": values.min(), "median": middle, "mean": values.mean(), "p95": late, "max": values.max()}
    return ", ".join(f"{name} {figure(round(float(value), 2))}" for name, value in named.items())


def bars(measure: Measure) -> Table:
    """A measure as horizontal bars."""
    made = histogram(measure.values)
    table = Table(
        title=Text(f"{measure.title} ({measure.unit})"),
        caption=Text(summary(measure.values)),
        title_justify="left",
        caption_justify="left",
        box=None,
        show_header=False,
        padding=(0, 1),
    )
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    most = int(made.counts.max())
    for number, count in enumerate(made.counts.tolist()):
        table.add_row(made.label(number), Text(_bar(count / most), style="cyan"), figure(count))
    return table


def _bar(share: float) -> str:
    """Blocks of an eighth of a character; something is seen of all that is not zero."""
    eighths = max(round(share * BAR * 8), 1 if share else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest] if rest else "█" * full
