"""Visual sharding and the exchange plan, executed in one process with numpy.

The oracle of the plan is the definition of a visual token: a weighted sum of features picked from all features laid end
to end. The test cuts these features up as the sharding says, moves them as the routes say, and must end with the same
tokens on the ranks that own them. Features are random, so that a feature in a wrong place shows.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrascope.parallel.context.tokens import shard_tokens
from tetrascope.parallel.context.visual import (
    FeatureRoute,
    features_of_frames,
    route_features,
    shard_visual,
    visual_places,
)

WIDTH = 3


def cost(rows: int) -> float:
    return 100.0 * rows + rows**2


UNITS = st.lists(st.integers(1, 300).map(lambda n: 4 * n), max_size=30)
RANKS = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(UNITS, RANKS)
def test_units_are_whole_in_order_and_balanced(rows: list[int], ranks: int) -> None:
    features, costs = [n // 4 for n in rows], [cost(n) for n in rows]
    sharding = shard_visual(rows, features, costs, ranks)
    ends, feature_ends = np.cumsum([0, *rows]), np.cumsum([0, *features])
    seen, feature_seen = [], []
    for rank in range(ranks):
        assert list(sharding.units[rank]) == sorted(sharding.units[rank])
        assert sharding.frames(rank) == tuple(rows[unit] for unit in sharding.units[rank])
        expected = [range(ends[unit], ends[unit + 1]) for unit in sharding.units[rank]]
        assert sharding.rows_of(rank).tolist() == [row for part in expected for row in part]
        seen += sharding.rows_of(rank).tolist()
        feature_seen += sharding.features_of(rank).tolist()
    assert sorted(seen) == list(range(ends[-1])) and sorted(feature_seen) == list(range(feature_ends[-1]))
    # Graham's bound of LPT, 4/3 - 1/(3·ranks) times the best, which is no less than the mean or the costliest unit.
    if rows:
        work = max(sum(costs[unit] for unit in own) for own in sharding.units)
        paired = sorted(costs)[-ranks - 1 :]
        least = max(sum(costs) / ranks, max(costs), sum(paired[:2]) if len(paired) > ranks else 0)
        assert work <= 1.05 * 4 / 3 * least


def test_neighbours_stay_together_where_they_may() -> None:
    """Frames of a video: each rank decodes a run of them. A large picture after small ones: balance comes first."""
    assert shard_visual([256] * 8, [64] * 8, [1.0] * 8, 4).units == ((0, 1), (2, 3), (4, 5), (6, 7))
    uneven = shard_visual([1] * 5, [1] * 5, [1.0, 5.0, 1.0, 5.0, 2.0], 2)
    assert max(sum([1.0, 5.0, 1.0, 5.0, 2.0][unit] for unit in own) for own in uneven.units) == 7
    assert uneven.units == ((0, 1, 2), (3, 4))
    mixed = shard_visual([1] * 4, [1] * 4, [5.0, 1.0, 1.0, 5.0], 2)
    assert mixed.units == ((0, 1), (2, 3))
    crossed = shard_visual([1] * 4, [1] * 4, [4.0, 4.0, 1.0, 1.0], 2)
    assert crossed.units == ((0, 2), (1, 3))


def test_ranks_without_an_image_have_empty_parts() -> None:
    sharding = shard_visual([8], [2], [1.0], 3)
    assert sharding.units == ((0,), (), ())
    assert sharding.frames(2) == () and len(sharding.rows_of(2)) == 0 and sharding.windows(1, [4, 4]) == ()
    assert shard_visual([], [], [], 2).units == ((), ())


def test_windows_follow_their_frames() -> None:
    sharding = shard_visual([12, 8, 12], [3, 2, 3], [4.0, 4.0, 1.0], 2, keep_order=0)
    assert sharding.units == ((0, 2), (1,))
    assert sharding.windows(0, [8, 4, 8, 4, 4, 4]) == (8, 4, 4, 4, 4)
    assert sharding.windows(1, [8, 4, 8, 4, 4, 4]) == (8,)
    with pytest.raises(ValueError, match="windows"):
        sharding.windows(0, [8, 8, 8, 8])


def test_features_of_frames() -> None:
    assert features_of_frames([1025] * 3, 768) == (256, 256, 256)
    assert features_of_frames([16, 64], 20) == (4, 16)
    assert features_of_frames([], 0) == ()
    with pytest.raises(ValueError, match="fraction"):
        features_of_frames([3, 5], 7)


def exchanged(routes: tuple[FeatureRoute, ...], own: list[np.ndarray]) -> list[np.ndarray]:
    """What every rank receives when all send what their routes say."""
    parts = [
        np.split(features[route.send_rows], np.cumsum(route.send_counts)[:-1])
        for route, features in zip(routes, own, strict=True)
    ]
    for route in routes:
        assert route.receive_counts == tuple(len(part[route.rank]) for part in parts)
    return [np.concatenate([part[route.rank] for part in parts]) for route in routes]


@settings(max_examples=100, deadline=None)
@given(
    units=st.lists(st.integers(1, 12), max_size=10),
    ring=st.integers(1, 4),
    ulysses=st.integers(1, 3),
    tp=st.sampled_from([1, 2]),
    texts=st.integers(0, 20),
    combined=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
def test_tokens_reach_their_owners(
    units: list[int], ring: int, ulysses: int, tp: int, texts: int, combined: int, seed: int
) -> None:
    """Any picks: several features a token, one feature in several tokens, features that no token needs, newlines."""
    generator = np.random.default_rng(seed)
    features = sum(units)
    visual = shard_visual([4 * n for n in units], units, [float(n) for n in units], ring * ulysses)
    tokens = 2 * features
    picks_CV = generator.integers(features + 1, size=(combined, tokens))
    weights_CV = generator.standard_normal((combined, tokens))
    all_FH, newline_H = generator.standard_normal((features, WIDTH)), generator.standard_normal((1, WIDTH))
    expected_VH = (np.concatenate([all_FH, newline_H])[picks_CV] * weights_CV[:, :, None]).sum(0)
    lengths = [n for n in (tokens + texts, 5) if n]
    visual_rows = np.sort(generator.choice(sum(lengths), tokens, replace=False))
    pack_TH = np.zeros((sum(lengths), WIDTH))
    pack_TH[visual_rows] = expected_VH
    sharding = shard_tokens(lengths, ring, ulysses, tp)
    pack_TH = np.concatenate([pack_TH, np.zeros((sharding.padding, WIDTH))])
    own = [all_FH[visual.features_of(rank)] for rank in range(ring * ulysses)]
    share = sharding.rank_rows // tp
    for tp_rank in range(tp):
        places = visual_places(visual_rows, sharding, tp_rank)
        routes = route_features(visual, picks_CV, [numbers for numbers, _ in places])
        for route, (numbers, rows), received in zip(routes, places, exchanged(routes, own), strict=True):
            assert (np.diff(rows) > 0).all()
            with_newline = np.concatenate([received, newline_H])
            local_TH = np.zeros((share, WIDTH))
            local_TH[rows] = (with_newline[route.picks_CM] * weights_CV[:, numbers, None]).sum(0)
            mine = sharding.rows_of(route.rank)[tp_rank * share : (tp_rank + 1) * share]
            np.testing.assert_allclose(local_TH, pack_TH[mine], rtol=0, atol=1e-12)
            assert len(received) == route.received == len(np.unique(received, axis=0))  # each feature comes once


def test_bytes_are_counted_from_the_needs() -> None:
    """Two images on two ranks, tokens of each half here, half there: half the features cross, once each."""
    visual = shard_visual([16, 16], [4, 4], [1.0, 1.0], 2)
    owners = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]
    routes = route_features(visual, np.arange(8)[None], owners)
    assert [route.send_counts for route in routes] == [(2, 2), (2, 2)]
    assert [route.bytes_sent(width=10, itemsize=2, tensors=3) for route in routes] == [2 * 10 * 2 * 3] * 2
    twice = route_features(visual, np.array([[0] * 8]), owners)  # one feature, eight tokens
    assert [route.send_counts for route in twice] == [(1, 1), (0, 0)]
    assert [route.bytes_sent(10, 2) for route in twice] == [20, 0]


def test_bad_plans_are_refused() -> None:
    visual = shard_visual([16], [4], [1.0], 2)
    with pytest.raises(ValueError, match="tokens of 1 ranks"):
        route_features(visual, np.arange(4)[None], [np.arange(4)])
    with pytest.raises(ValueError, match="but 4 features"):
        route_features(visual, np.array([[5]]), [np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)])
    with pytest.raises(ValueError, match="2 rows"):
        shard_visual([1, 2], [1], [1.0], 1)
