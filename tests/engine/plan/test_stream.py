"""The stream of samples: every sample exactly once an epoch, the shares asked for, and no memory of what came before.

The oracle for shares and epochs is counting.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.engine.plan import Source, Stream
from tetrascope.engine.plan.stream import BLOCK, places_per_block
from tetrascope.errors import UserError

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("length", [1, 7, BLOCK, 5000])
def test_one_source_comes_in_its_plain_order_epoch_by_epoch(length: int, shuffle: bool) -> None:
    stream = Stream([Source("a", length, shuffle=shuffle)], 3)
    draws = [stream[position] for position in range(3 * length)]
    assert [draw.position for draw in draws] == list(range(3 * length))
    assert [draw.epoch for draw in draws] == [epoch for epoch in range(3) for _ in range(length)]
    epochs = [[draw.sample for draw in draws[e * length : (e + 1) * length]] for e in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 1:
        assert (epochs[0] == list(range(length))) != shuffle
        assert (epochs[0] == epochs[1]) != shuffle or length == 7


def test_seed_and_epoch_change_the_order() -> None:
    orders = [
        tuple(Stream([Source("a", 50)], seed)[epoch * 50 + i].sample for i in range(50))
        for seed in (0, 1, 2**63 - 1)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_sources_of_one_length_have_orders_of_their_own() -> None:
    stream = Stream([Source("a", 50), Source("b", 50)], 0)
    orders: list[list[int]] = [[], []]
    for position in range(200):
        draw = stream[position]
        orders[draw.source].append(draw.sample)
    assert orders[0][:50] != orders[1][:50]


def test_golden_order() -> None:
    # A resumed run must find the stream of the run before it, whatever version of the package wrote that.
    stream = Stream([Source("a", 5), Source("b", 3, weight=2)], 5)
    found = [(d.source, d.sample, d.epoch) for d in (stream[p] for p in (0, 1, 2, 3, 4, 5, 10_000, 10_001))]
    assert found[:6] == [(1, 0, 0), (1, 1, 0), (1, 2, 0), (0, 4, 0), (1, 2, 1), (0, 3, 0)]
    assert found[6:] == [(1, 1, 2223), (0, 2, 666)]


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.lists(st.integers(1, 9000), min_size=6, max_size=6), st.integers(0, 2**63 - 1))
def test_every_block_has_the_shares_and_every_epoch_every_sample_once(
    weights: list[float], lengths: list[int], seed: int
) -> None:
    sources = [Source(str(i), n, w) for i, (w, n) in enumerate(zip(weights, lengths, strict=False))]
    stream = Stream(sources, seed)
    draws = [stream[position] for position in range(3 * BLOCK)]
    for block in range(3):
        counts = Counter(draw.source for draw in draws[block * BLOCK : (block + 1) * BLOCK])
        for number, source in enumerate(sources):
            exact = BLOCK * source.weight / sum(weights)
            # Rounded by less than one place; more only where others got their single place at its expense.
            assert counts[number] == stream.places[number] >= 1
            assert abs(counts[number] - exact) < 1 + sum(p == 1 for p in stream.places)
    for number, source in enumerate(sources):
        own = [draw for draw in draws if draw.source == number]
        assert [draw.epoch for draw in own] == [k // source.length for k in range(len(own))]
        for start in range(0, len(own) - source.length + 1, source.length):
            assert {draw.sample for draw in own[start : start + source.length]} == set(range(source.length))
    assert stream.epochs(3 * BLOCK) == tuple(
        3 * places / source.length for places, source in zip(stream.places, sources, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 100))
def test_any_place_is_found_without_those_before_it(weights: list[float], asked: list[int], seed: int) -> None:
    sources = [Source(str(i), 10 + i, w) for i, w in enumerate(weights)]
    one = Stream(sources, seed)
    there = {position: one[position] for position in asked}
    assert there == {position: Stream(sources, seed)[position] for position in reversed(asked)}


def test_epochs_count_what_came_before() -> None:
    stream = Stream([Source("a", 10), Source("b", 100, weight=3), Source("none", 0, weight=0)], 1)
    for position in (0, 1, 37, BLOCK, BLOCK + 5):
        counts = Counter(stream[p].source for p in range(position))
        assert stream.epochs(position) == (counts[0] / 10, counts[1] / 100, 0.0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), (2048, 2048)),
        ((1, 1, 1), (1366, 1365, 1365)),
        ((1, 0, 3), (1024, 0, 3072)),
        ((1e-9, 1), (1, 4095)),
        ((1e-9, 1, 1e-300, 1), (1, 2047, 1, 2047)),
    ],
)
def test_rounding_of_shares(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert places_per_block([Source("s", 5, weight) for weight in weights]) == expected


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Source("a", 3, -1.0)], r"source a: weight -1.0 must be zero or a positive number"),
        ([Source("a", 3, float("nan"))], r"source a: weight nan must be"),
        ([Source("a", 3, float("inf"))], r"source a: weight inf must be"),
        ([Source("a", 3), Source("b", 0)], r"source b: holds no samples; remove it or set its weight to 0"),
        ([Source("a", 3, 0.0)], r"no source has a weight above 0"),
        ([], r"no source has a weight above 0"),
        ([Source("a", 3)] * (BLOCK + 1), r"more than 4096 with a weight"),
    ],
)
def test_mixtures_that_cannot_be(sources: list[Source], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stream(sources, 0)


def test_blocks_are_shuffled_and_stay_together() -> None:
    ends = (3, 10, 11, 40)
    stream = Stream([Source("a", 40, blocks=ends)], 1)
    orders = [[stream[epoch * 40 + i].sample for i in range(40)] for epoch in range(3)]
    block_of = [next(number for number, end in enumerate(ends) if sample < end) for sample in range(40)]
    met = []
    for order in orders:
        assert sorted(order) == list(range(40))
        runs = [block_of[sample] for sample in order]
        met.append([run for i, run in enumerate(runs) if i == 0 or runs[i - 1] != run])
        assert sorted(met[-1]) == [0, 1, 2, 3]  # every block once, in one piece
    assert len({tuple(order) for order in orders}) == 3 and len({tuple(order) for order in met}) > 1
    inside = [sample for sample in orders[0] if block_of[sample] == 3]
    assert inside != sorted(inside)
