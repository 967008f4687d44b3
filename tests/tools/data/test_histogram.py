"""Bounds that a reader can take in, and no value lost."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from tetrascope.tools.data.histogram import bars, histogram
from tetrascope.tools.data.statistics import Measure


@pytest.mark.parametrize(
    "values",
    [
        np.array([0]),
        np.array([7]),
        np.array([3, 3, 3]),
        np.arange(1000),
        np.array([0, 1, 2, 5]),
        np.array([0.1, 0.25, 99.9]),
        np.array([0, 1, 2, 3, 40_000]),
        np.array([0.0, 0.003, 0.004, 17.0]),
        np.array([1e15, 3e15]),
        np.random.default_rng(0).lognormal(5, 2, size=500),
    ],
)
def test_every_value_is_in_the_bin_that_says_so(values: np.ndarray) -> None:
    made = histogram(values)
    assert made.counts.sum() == len(values) and len(made.counts) <= 40
    assert (np.diff(made.edges) > 0).all()
    places = np.searchsorted(made.edges, values, side="right") - 1
    assert np.bincount(places, minlength=len(made.counts)).tolist() == made.counts.tolist()


def test_bins_have_round_bounds_and_whole_numbers_name_both_ends() -> None:
    made = histogram(np.arange(30, 800))
    assert made.edges[:3].tolist() == [0, 50, 100] and made.label(1) == "50–99"
    few = histogram(np.array([1, 1, 2, 4]))
    assert [few.label(i) for i in range(len(few.counts))] == ["1", "2", "3", "4"]
    assert few.counts.tolist() == [2, 1, 0, 1]
    assert histogram(np.array([0.1, 0.9])).whole is False


def test_bins_grow_where_a_few_values_are_far_away() -> None:
    made = histogram(np.array([0, 10, 10, 12, 30_000]))
    assert made.edges.tolist() == [0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000]
    assert made.counts[[0, 1, -1]].tolist() == [1, 3, 1]


def test_mostly_zeros_do_not_hide_the_rest() -> None:
    made = histogram(np.array([0] * 90 + [1, 2, 2, 5]))
    assert made.edges.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_bars_are_as_long_as_the_counts() -> None:
    measure = Measure("Tokens [bold]per[/bold] sample", "tokens", "samples", np.array([1.0] * 80 + [2.0] * 20 + [4.0]))
    with (console := Console(width=100)).capture() as shown:
        console.print(bars(measure))
    lines = shown.get().splitlines()
    assert "[bold]" in lines[0] and "tokens" in lines[0]
    assert [line.count("█") for line in lines[1:5]] == [40, 10, 0, 0]
    assert "▌" in lines[4] and lines[3].split() == ["3", "0"]
    assert lines[5].startswith("min 1, median 1, mean 1.23, p95 2, max 4")
