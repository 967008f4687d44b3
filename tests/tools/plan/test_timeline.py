"""Drawings of timelines: what stands in them is what was timed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.simulator import Costs, Span, Timeline, simulate
from tetrascope.tools.plan.timeline import KINDS, STYLE, Wait, draw, idle_share, rows_of, seconds


def one_f_one_b(latency: float = 0.0) -> tuple[Timeline, Costs]:
    costs = Costs([[1.0] * 4] * 2, [[1.0] * 4] * 2, [[1.0] * 4] * 2, latency=latency)
    return simulate(GENERATORS["1f1b"](2, 4), costs), costs


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def test_every_action_is_drawn_once_where_it_ran() -> None:
    timeline, _ = one_f_one_b()
    root = parsed(draw([("predicted", timeline.spans)]))
    ground = next(float(rect.get("width", 0)) for rect in root.iter("rect") if rect.get("class") == "ground")
    bars = [rect for rect in root.iter("rect") if rect.get("class") != "ground"]
    spans = [span for row in timeline.spans for span in row]
    assert len(bars) == len(spans) == 2 * 4 * 2
    for bar, span in zip(bars, spans, strict=True):
        assert bar.get("class") == span.action.kind.value
        assert float(bar.get("x", 0)) == pytest.approx(span.start / timeline.makespan * ground, abs=0.1)
        assert float(bar.get("width", 0)) == pytest.approx(
            (span.end - span.start) / timeline.makespan * ground, abs=0.5
        )
    assert "F0, forward of micro-batch 0, chunk 1: 1 s to 2 s, 1 s" in draw([("predicted", timeline.spans)])


def test_bubble_shares_stand_beside_the_rows() -> None:
    # Equal costs: (p - 1) / (m + p - 1) = 1/5 of the time is bubble on either stage.
    timeline, _ = one_f_one_b()
    assert draw([("x", timeline.spans)]).count(">20.0 %<") == 2


def test_the_bubble_of_the_longer_timeline_does_not_change_that_of_the_other() -> None:
    timeline, _ = one_f_one_b()
    slow = [[Span(s.action, 2 * s.start, 2 * s.end) for s in row] for row in timeline.spans]
    html = draw([("predicted", timeline.spans), ("measured", slow)])
    assert html.count(">20.0 %<") == 4
    grounds = [float(w) for w in re.findall(r'class="ground" x="0" y="\d+" width="([\d.]+)"', html)]
    assert grounds[2] == pytest.approx(2 * grounds[0], rel=1e-3)
    assert html.index("predicted") < html.index("measured")


def test_waits_for_transfers_are_told_from_bubbles() -> None:
    timeline, costs = one_f_one_b(latency=0.25)
    rows = rows_of(timeline, costs)
    waits = [one for one in rows[1] if isinstance(one, Wait)]
    # The last stage waits for the first forward to end (bubble), then for its transfer.
    assert (waits[0].start, waits[0].end) == (1.0, 1.25)
    assert idle_share(rows[1], timeline.makespan) == idle_share(timeline.spans[1], timeline.makespan)
    assert KINDS["transfer"] in draw([("x", rows)])
    assert KINDS["transfer"] not in draw([("x", timeline.spans)])


def test_vision_has_colours_of_its_own() -> None:
    timeline, _ = one_f_one_b()
    assert 'class="vision"' not in draw([("x", timeline.spans)])
    assert draw([("x", timeline.spans)], vision_chunk=True).count('<rect class="vision"') == 4


def test_titles_are_escaped_and_nothing_is_loaded() -> None:
    timeline, _ = one_f_one_b()
    html = draw([("<script>alert(1)</script>", timeline.spans)])
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "http" not in html + STYLE and "url(" not in STYLE


def test_numbers_are_left_out_where_there_is_no_room() -> None:
    timeline, _ = one_f_one_b()
    thin = [[Span(s.action, s.start, s.start + 1e-9) for s in row] for row in timeline.spans]
    assert 'class="number"' not in draw([("x", [*thin, timeline.spans[0][:0]])])


def test_nothing_to_draw() -> None:
    assert "stage 0" in draw([("empty", [[]])])


@pytest.mark.parametrize(("value", "text"), [(1.25, "1.25 s"), (0.0314, "31.4 ms"), (7e-6, "7 µs"), (0, "0 s")])
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text
