"""The axes: which rank lies where. Process groups are tested where there are processes."""

from __future__ import annotations

import pytest
import torch

from tetrascope.parallel.mesh import AXES, Layout

LAYOUTS = [Layout(), Layout(tp=4), Layout(pp=2, dp=3, tp=2), Layout(pp=2, dp=3, ring=2, ulysses=4, tp=5)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_are_the_elements_of_an_array_with_tensor_parallelism_innermost(layout: Layout) -> None:
    # The oracle: number an array of the axes' sizes row by row, as torch's DeviceMesh does.
    ranks = torch.arange(layout.world).reshape(layout.pp, layout.dp, layout.ring, layout.ulysses, layout.tp)
    assert layout.sizes == tuple(ranks.shape) and layout.world == ranks.numel()
    for place in (ranks == ranks).nonzero().tolist():
        rank = int(ranks[tuple(place)])
        assert layout.coordinates(rank) == dict(zip(AXES, place, strict=True))
        assert layout.rank(dict(zip(AXES, place, strict=True))) == rank


def test_golden_places() -> None:
    layout = Layout(pp=2, dp=3, tp=4)
    assert layout.world == 24
    assert layout.coordinates(1) == {"pp": 0, "dp": 0, "ring": 0, "ulysses": 0, "tp": 1}
    assert layout.coordinates(4) == {"pp": 0, "dp": 1, "ring": 0, "ulysses": 0, "tp": 0}
    assert layout.coordinates(23) == {"pp": 1, "dp": 2, "ring": 0, "ulysses": 0, "tp": 3}
    assert layout.rank({"pp": 1, "dp": 0, "ring": 0, "ulysses": 0, "tp": 0}) == 12


def test_a_layout_is_printed_by_its_axes_above_one() -> None:
    assert str(Layout(pp=2, dp=3, tp=4)) == "PP2×DP3×TP4"
    assert str(Layout(ring=2, ulysses=2)) == "RING2×ULYSSES2"
    assert str(Layout()) == "1 rank"


def test_layouts_are_values() -> None:
    assert Layout(tp=2) == Layout(tp=2) != Layout(pp=2)
    assert len({Layout(tp=2), Layout(tp=2), Layout()}) == 2
