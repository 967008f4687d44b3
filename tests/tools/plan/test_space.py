"""What is chosen between."""

from __future__ import annotations

import pytest

from tetrascope.engine.config import BatchSection
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.plan.space import FIXED, PLANNED, batches, layouts


@pytest.mark.parametrize(("gpus", "count"), [(1, 1), (2, 5), (4, 15), (6, 25), (1024, 1001)])
def test_layouts_are_all_factorisations_into_five_axes(gpus: int, count: int) -> None:
    # A prime to the power e is shared over five axes in (e + 4 choose 4) ways.
    found = list(layouts(gpus))
    assert len(found) == len(set(found)) == count
    assert {layout.world for layout in found} == {gpus}


def test_samples_in_micro_batches_of_all_sizes() -> None:
    found = batches(BatchSection(samples=96, micro_batches=5), Layout(dp=8), 100)
    assert [one.micro_batches for one in found] == [1, 3, 5, 6, 12]
    assert {one.samples for one in found} == {96}


def test_fewer_samples_than_ranks_leave_the_configured_number() -> None:
    assert {one.micro_batches for one in batches(BatchSection(samples=4, micro_batches=2), Layout(dp=8), 100)} == {1, 2}


def test_packs_keep_the_global_batch_and_hold_the_longest_sample() -> None:
    found = batches(BatchSection(tokens=65536, pack=4096), Layout(dp=4), 2000)
    assert [one.pack for one in found] == [2048, 4096, 8192, 16384]
    assert {one.tokens for one in found} == {65536}


def test_the_configured_pack_stays_though_it_is_too_short() -> None:
    # The planner then says what is wrong with it.
    assert [one.pack for one in batches(BatchSection(tokens=8192, pack=2048), Layout(), 5000)] == [2048, 8192]


@pytest.mark.parametrize("pipelining", [*FIXED, *PLANNED], ids=str)
def test_every_schedule_has_its_place(pipelining: object) -> None:
    from tetrascope.tools.plan.space import Pipelining

    assert isinstance(pipelining, Pipelining)
    place = pipelining.place(4)
    assert len(place) == 4 * pipelining.virtual_stages and place[0] == 0
