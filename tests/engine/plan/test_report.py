"""What a report says, on plans small enough to count by hand, and the figures of a large mixture."""

from __future__ import annotations

import pytest

from tests.engine.plan.samples import by_samples, by_tokens, texts
from tetrascope.engine.plan import report
from tetrascope.tools.plan.mixed import Measured, measure, mixed_example


def test_figures_by_hand() -> None:
    made = by_samples(texts([40, 10, 10, 40]), 4, 1, shuffle=False, dp=2)
    found = report(made, made.plan(0))
    assert found.planned.efficiency == 1 and found.planned.ranks == found.planned.micro_batches == (1, 1)
    # In turn: 40 + 10 and 10 + 40, even by chance; the other way round they are not.
    made = by_samples(texts([40, 10, 40, 10]), 4, 1, shuffle=False, dp=2)
    found = report(made, made.plan(0))
    assert found.planned.ranks.decoder == 1
    assert found.naive.ranks == (80 / 50, 1) and found.naive.efficiency == 100 / 160


def test_first_fit_takes_as_many_packs_as_it_needs() -> None:
    made = by_tokens(texts([50, 60, 50, 40] * 4), 2, 100)
    plan = made.plan(0)
    found = report(made, plan)
    assert found.planned.efficiency == 1 and sum(micro.rows for micro in plan.micro_batches[0]) == 200
    made = by_tokens(texts([30, 50, 60, 30, 30, 70] * 9), 3, 100)
    figures = [report(made, made.plan(step)) for step in range(9)]
    assert any(one.naive.efficiency < one.planned.efficiency for one in figures)


@pytest.fixture(scope="module")
def mixed() -> Measured:
    return measure(seed=1, samples=20_000, steps=3)


def test_a_large_mixture_is_packed_and_balanced(mixed: Measured) -> None:
    """Text, images, and videos; 8 ranks with 16 packs of 32768 each. The bounds are what the engine promises."""
    for one in mixed.reports:
        assert one.planned.efficiency >= 0.98
        assert one.planned.ranks.decoder <= 1.05 and one.planned.ranks.vision <= 1.15
        assert one.planned.micro_batches.vision < 1.15 < 1.3 < one.naive.micro_batches.vision
        assert one.planned.efficiency > one.naive.efficiency
        assert max(one.planned.ranks) < max(one.naive.ranks)


def test_planning_is_quick(mixed: Measured) -> None:
    """A bound that a busy machine keeps too; the figure itself is printed by `tetrascope.tools.plan.mixed`."""
    assert mixed.seconds / mixed.samples < 2e-3


def test_the_mixture_is_what_it_says() -> None:
    infos = mixed_example(0, 5000)
    assert infos == mixed_example(0, 5000) != mixed_example(1, 5000)
    text = [info.tokens for info in infos if not info.media]
    videos = [info for info in infos if info.media and info.media[0].kind == "video"]
    several = [info for info in infos if len(info.media) > 1]
    assert 0.57 < len(text) / 5000 < 0.63 and min(text) >= 50 and max(text) <= 800
    assert 0.02 < len(videos) / 5000 < 0.04 and 8000 < max(v.media[0].tokens for v in videos) <= 16384
    assert 0.05 < len(several) / 5000 < 0.09
    assert max(info.tokens for info in infos) <= 32768
