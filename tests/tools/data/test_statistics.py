"""Totals and arrays over hand-made indexes, against sums done sample by sample."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from tetrascope.engine.data.index import Bad, Index
from tetrascope.engine.plan import CostModel
from tetrascope.models.family import get_family
from tetrascope.models.media import Media
from tetrascope.tools.data.statistics import Statistics, statistics

COST = CostModel(get_family("qwen2_vl").presets["2b"]())


def media(kind: Literal["image", "video"], t: int, h: int, w: int) -> Media:
    numbers = tuple(range(2 * t)) if kind == "video" else ()
    tokens = t * h * w // 4
    return Media(kind, (t, h, w), (h * w,) * t, tokens, tokens, numbers=numbers, size=(14 * w, 14 * h))


IMAGE, LARGE, VIDEO = media("image", 1, 4, 6), media("image", 1, 8, 4), media("video", 3, 4, 4)
SHOWN = [(), (IMAGE,), (IMAGE, LARGE), (VIDEO, IMAGE)]


def index_of(tokens: list[int], shown: list[int], bad: list[Bad]) -> Index:
    count = len(tokens)
    columns = {
        "number": np.arange(count),
        "first": np.zeros(count, np.int64),
        "last": np.zeros(count, np.int64),
        "tokens": np.array(tokens),
        "supervised": np.array(tokens) // 2,
    }
    return Index(columns, np.array(shown), SHOWN, bad, "mark")


ONE = index_of([10, 40, 40, 60], [0, 1, 1, 2], [Bad(4, "missing file", "gone"), Bad(5, "bad json", "no")])
TWO = index_of([50, 20], [3, 0], [Bad(0, "missing file", "gone too")])


def values(found: Statistics, title: str) -> list[float]:
    return next(measure for measure in found.measures if measure.title == title).values.tolist()


def test_arrays_follow_the_samples() -> None:
    found = statistics("all", [ONE, TWO], COST)
    assert (found.samples, found.tokens, found.supervised) == (6, 220, 110)
    assert (found.images, found.videos, found.visual) == (5, 1, 6 + 6 + 14 + 18)
    assert found.bad_kinds == {"missing file": 2, "bad json": 1}
    assert values(found, "Tokens per sample") == [10, 40, 40, 60, 50, 20]
    assert values(found, "Images per sample") == [0, 1, 1, 2, 1, 0]
    assert values(found, "Share of visual tokens") == pytest.approx([0, 15, 15, 1400 / 60, 36, 0])
    assert sorted(values(found, "Image width")) == [56, 84, 84, 84, 84]
    assert sorted(values(found, "Image height")) == [56, 56, 56, 56, 112]
    assert values(found, "Frames taken per video") == [6]


def test_work_is_that_of_the_cost_model() -> None:
    found = statistics("one", [ONE], COST)
    costs = [COST(ONE[place]) for place in range(len(ONE))]
    for title, kind in (("Decoder work per sample", 0), ("Vision work per sample", 1)):
        measure = next(one for one in found.measures if one.title == title)
        scale = {"TFLOP": 1e12, "GFLOP": 1e9}[measure.unit.split(",")[0]]
        assert (measure.values * scale).tolist() == pytest.approx([cost[kind] for cost in costs])
        assert 1 <= measure.values.max() < 1000


def test_what_there_is_none_of_is_not_shown() -> None:
    text = statistics("text", [index_of([5, 6], [0, 0], [])], COST)
    titles = [measure.title for measure in text.measures]
    assert titles == ["Tokens per sample", "Supervised tokens per sample", "Decoder work per sample"]
