"""Packs of samples: both kinds of work spread, and the packs filled. Capacity, completeness and waiting are properties
of many steps and are tested in test_planner.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.plan.samples import by_samples, by_tokens, image, random_infos, texts
from tetrascope.engine.plan import SampleInfo, report
from tetrascope.engine.plan.cost import Cost
from tetrascope.engine.plan.packing import LONGEST_WAIT, PATIENCE, Item, pack


def test_micro_batches_are_balanced_in_both_kinds_of_work() -> None:
    # 64 samples in 8 bins, so that 2 in 3 of a bin's 8 have a picture: within 5 % (2 % measured).
    made = by_samples(random_infos(1000), 64, 2, dp=4)
    for step in range(10):
        figures = report(made, made.plan(step)).planned
        assert max(figures.micro_batches) < 1.05 and max(figures.ranks) < 1.01


def test_pictures_stand_apart_from_text() -> None:
    # One large picture against three texts of the same tokens.
    infos = [SampleInfo(10, 1, (image(8, 8),)), *texts([10] * 3)]
    (one, other) = by_samples(infos, 4, 2, shuffle=False).plan(0).micro_batches[0]
    assert {len(one.samples), len(other.samples)} == {2}  # the decoder's work is even
    infos = [SampleInfo(10, 1, (image(8, 8),))] * 2 + [SampleInfo(40, 1, ())] * 2
    for micro in by_samples(infos, 4, 2, shuffle=False).plan(0).micro_batches[0]:
        assert len({0, 1} & set(micro.samples)) == 1  # a picture each


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_rows_divide_by_tp_and_pad_as_little_as_that_needs(tp: int) -> None:
    infos = random_infos(40)
    for made in (by_samples(infos, 20, 2, tp=tp, dp=2), by_tokens(infos, 4, 2000, tp=tp, dp=2)):
        plan = made.plan(1)
        for rank in plan.micro_batches:
            for micro in rank:
                tokens = sum(made.info(plan.draws[i]).tokens for i in micro.samples)
                assert micro.rows % tp == 0 and 0 <= micro.rows - tokens < tp


@pytest.mark.parametrize(("low", "high", "fill"), [(1, 200, 0.995), (100, 400, 0.97), (300, 600, 0.92)])
def test_packs_are_filled(low: int, high: int, fill: float) -> None:
    """Also where nothing short is there to fill gaps: 300 to 600 of 1000 tokens are two or three in a pack."""
    lengths = np.random.default_rng(0).integers(low, high + 1, 2000).tolist()
    made = by_tokens(texts(lengths), 16, 1000)
    plans = [made.plan(step) for step in range(20)]
    assert min(report(made, plan).planned.efficiency for plan in plans[2:]) > fill


def test_what_has_waited_long_comes_first() -> None:
    """Packs of 100; text of 60 and 40 fits perfectly, the one of 55 never: without patience it would wait for ever."""
    lengths = [60, 40] * 3 + [55] + [60, 40] * 3
    items = [Item(i, 9 - PATIENCE if n == 55 else 9, n, Cost(float(n), 0.0)) for i, n in enumerate(lengths)]
    young = [Item(i.position, 9, i.tokens, i.cost) for i in items]
    assert any(6 in members for members in pack(items, 9, 2, 100))
    assert LONGEST_WAIT > PATIENCE
    assert sum(lengths[i] for members in pack(young, 9, 6, 100) for i in members) == 600
