"""Visual sharding: which context-parallel rank encodes which frames, and how features reach the owners of their tokens.

Encoding is divided by cost, without regard to where the tokens lie. What is divided are units: the attention sequences
of the encoder (a picture, a tile, a frame of a video), which are never cut, and with them no window and no merge block.
Afterwards each feature travels once to every rank that has a token made of it; a weighted sum of several features is
taken there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from tetrascope.parallel.context.tokens import TokenSharding

NEIGHBOURS_WORTH = 1.05
"""How much longer the busiest rank may take for units to stay in order, so that a rank decodes few videos."""


@dataclass(frozen=True, eq=False)
class VisualSharding:
    """Who encodes what. Made by `shard_visual`.

    rows, features: encoder rows of every unit, and features that come out of it. rank_of: the rank that encodes it.
    A rank's units keep their order.
    """

    ranks: int
    rows: tuple[int, ...]
    features: tuple[int, ...]
    rank_of: tuple[int, ...]

    @cached_property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of each rank's units; a rank may have none."""
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for unit, rank in enumerate(self.rank_of):
            found[rank].append(unit)
        return tuple(map(tuple, found))

    def frames(self, rank: int) -> tuple[int, ...]:
        """Lengths of a rank's attention sequences, in rows."""
        return tuple(self.rows[unit] for unit in self.units[rank])

    def windows(self, rank: int, windows: Sequence[int]) -> tuple[int, ...]:
        """A rank's windows, from the lengths of all. Raises ValueError when one crosses the border of a unit."""
        ends, borders = [0, *accumulate(windows)], [0, *accumulate(self.rows)]
        place = {end: number for number, end in enumerate(ends)}
        if ends[-1] != borders[-1] or not all(border in place for border in borders):
            raise ValueError(f"windows of {ends[-1]} rows do not fill the units of {borders[-1]} rows one by one")
        return tuple(
            length for unit in self.units[rank] for length in windows[place[borders[unit]] : place[borders[unit + 1]]]
        )

    def rows_of(self, rank: int) -> np.ndarray:
        """Which of all encoder rows a rank encodes, int64, in its order."""
        return _ranges(self.rows, self.units[rank])

    def features_of(self, rank: int) -> np.ndarray:
        """Which of all features a rank computes, int64, in its order."""
        return _ranges(self.features, self.units[rank])


def shard_visual(
    rows: Sequence[int],
    features: Sequence[int],
    costs: Sequence[float],
    ranks: int,
    keep_order: float = NEIGHBOURS_WORTH,
) -> VisualSharding:
    """Divides units over ranks by cost; rows, features, costs: of each unit, in the order of the micro-batch.

    Neighbours stay together if the busiest rank then has at most keep_order times the work it has in the better
    balanced assignment, longest processing time first (Graham 1969); that one is taken otherwise.
    """
    if not len(rows) == len(features) == len(costs) or ranks < 1:
        raise ValueError(f"{len(rows)} rows, {len(features)} features, {len(costs)} costs, {ranks} ranks")
    balanced, ordered = _longest_first(costs, ranks), _in_order(costs, ranks)
    chosen = ordered if _makespan(ordered, costs, ranks) <= keep_order * _makespan(balanced, costs, ranks) else balanced
    return VisualSharding(ranks, tuple(rows), tuple(features), tuple(chosen))


def features_of_frames(frames: Sequence[int], features: int) -> tuple[int, ...]:
    """Features of each frame of an image or video, from those of all: as many for a row everywhere.

    Raises ValueError when they do not divide so.
    """
    total = sum(frames)
    if total and any(features * rows % total for rows in frames):
        raise ValueError(f"{features} features of frames of {list(frames)} rows: a frame would have a fraction of one")
    return tuple(features * rows // total for rows in frames)


@dataclass(frozen=True, eq=False)
class FeatureRoute:
    """One rank's part in the exchange of features.

    send_rows: int64 `[S]`, which of its own features it sends, those for rank 0 first, then for rank 1, … A feature
    may go to several ranks. send_counts, receive_counts: features to and from every rank, its own included.
    picks: int64 `[C, M]`, what each of its M visual tokens is made of, as places among the received features; an index
    equal to their number means the adaptor's newline vector.
    """

    rank: int
    send_rows: np.ndarray
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    picks_CM: np.ndarray

    @property
    def received(self) -> int:
        """Features that this rank receives, its own included."""
        return sum(self.receive_counts)

    def bytes_sent(self, width: int, itemsize: int, tensors: int = 1) -> int:
        """Bytes that leave this rank in the forward: features for others · width · bytes of a number · tensors.

        As many arrive in the backward as gradients, from the same ranks.
        """
        return (sum(self.send_counts) - self.send_counts[self.rank]) * width * itemsize * tensors


def route_features(
    sharding: VisualSharding, picks_CV: np.ndarray, tokens: Sequence[np.ndarray]
) -> tuple[FeatureRoute, ...]:
    """The exchange after which every rank has what its visual tokens are made of, as each rank's part in it.

    picks: int64 `[C, V]`, features of which each visual token of the micro-batch is made, counted over all units; an
    index equal to their number means the newline vector. tokens: which visual tokens every rank needs, int64, in its
    own order (`visual_places`); ranks may need none, and several may need the same.

    Raises ValueError when there is not one entry of `tokens` a rank or a pick is out of range.
    """
    features = sum(sharding.features)
    if len(tokens) != sharding.ranks:
        raise ValueError(f"tokens of {len(tokens)} ranks, units of {sharding.ranks}")
    if picks_CV.size and not 0 <= picks_CV.min() <= picks_CV.max() <= features:
        raise ValueError(f"picks from {picks_CV.min()} to {picks_CV.max()}, but {features} features")
    # A feature's place among all, were the ranks' features laid end to end: sorted by it, they are sorted by rank.
    mine = [sharding.features_of(rank) for rank in range(sharding.ranks)]
    ends = np.cumsum([0, *map(len, mine)])
    place_F = np.empty(features + 1, dtype=np.int64)
    place_F[np.concatenate(mine)] = np.arange(features)
    place_F[features] = features  # the newline: after all features, of no rank
    needs, counts_RE, picks = [], np.empty((sharding.ranks, sharding.ranks), dtype=np.int64), []
    for receiver, own in enumerate(tokens):
        wanted_CM = place_F[picks_CV[:, own]]
        needed_F = np.zeros(features + 1, dtype=bool)
        needed_F[wanted_CM] = True
        needed_F[features] = False
        need = np.flatnonzero(needed_F)
        needs.append(np.split(need, np.searchsorted(need, ends[1:-1])))
        counts_RE[receiver] = [len(part) for part in needs[-1]]
        picks.append((np.cumsum(needed_F) - needed_F)[wanted_CM])  # the newline comes after all that are needed
    return tuple(
        FeatureRoute(
            rank,
            np.concatenate([need[rank] for need in needs]) - ends[rank],
            tuple(counts_RE[:, rank].tolist()),
            tuple(counts_RE[rank].tolist()),
            picks[rank],
        )
        for rank in range(sharding.ranks)
    )


def visual_places(
    visual_rows: np.ndarray, sharding: TokenSharding, tp_rank: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """For every context-parallel rank, at one place in tensor parallelism: its visual tokens, and its rows they lie in.

    visual_rows: int64 `[V]`, rows of the pack that are visual tokens, in order. Both results int64 `[M]` and
    ascending: numbers of visual tokens, and rows counted from the first of the tensor-parallel share.
    """
    places = sharding.inverse[visual_rows]
    share = sharding.rank_rows // sharding.tp
    found = []
    for rank in range(sharding.ring * sharding.ulysses):
        first = rank * sharding.rank_rows + tp_rank * share
        tokens = np.flatnonzero((places >= first) & (places < first + share))  # a rank's rows keep the pack's order
        found.append((tokens, places[tokens] - first))
    return tuple(found)


def _ranges(lengths: Sequence[int], chosen: Sequence[int]) -> np.ndarray:
    """The rows of the chosen among ranges that lie end to end."""
    starts = [0, *accumulate(lengths)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(starts[i], starts[i + 1]) for i in chosen)])


def _makespan(rank_of: Sequence[int], costs: Sequence[float], ranks: int) -> float:
    return float(np.bincount(np.asarray(rank_of, dtype=np.int64), np.asarray(costs, dtype=float), ranks).max())


def _longest_first(costs: Sequence[float], ranks: int) -> list[int]:
    """Each unit, costliest first, to the rank with the least so far."""
    load_R, rank_of = np.zeros(ranks), [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank_of[unit] = int(load_R.argmin())
        load_R[rank_of[unit]] += costs[unit]
    return rank_of


def _in_order(costs: Sequence[float], ranks: int) -> list[int]:
    """Consecutive units on every rank: the division with the least cost of the busiest, found by bisection."""
    low, high = max([*costs, sum(costs) / ranks]), sum(costs)
    best = _filled(costs, high)
    for _ in range(50):
        limit = (low + high) / 2
        found = _filled(costs, limit)
        if found and found[-1] >= ranks:
            low = limit
        else:
            best, high = found, limit
    return best


def _filled(costs: Sequence[float], limit: float) -> list[int]:
    """Ranks filled one after another up to a limit, which no unit exceeds; as many ranks as it takes."""
    rank_of, rank, load = [], 0, 0.0
    for cost in costs:
        if load and load + cost > limit:
            rank, load = rank + 1, 0.0
        rank_of.append(rank)
        load += cost
    return rank_of
