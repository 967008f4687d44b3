"""How many rows of each document each ring rank gets.

In a zigzag a rank holds two chunks of a document of n rows, mirrored about its middle. Two chunks of a rows each make
a·(n + 1) pairs of attending rows, wherever they lie and whatever the other ranks hold: every row costs (n + 1) / 2. So
the ranks' shares of a document need not be equal, attention work follows from the numbers of rows alone, and a rank
that holds some short documents whole is evened out by a larger or smaller part of the long ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GOOD_BALANCE = 1.01
"""Largest attention work of a rank over the mean that is not worth cutting more documents for."""


def ring_shares(lengths: Sequence[int], ring: int, ring_rows: int, chunk: int, row_pairs: float) -> np.ndarray:
    """Rows of each document on each ring rank, int64 `[ring, documents + 1]`; the last column is padding.

    lengths: rows of each document. ring_rows: rows of every rank, ring · ring_rows ≥ sum(lengths).
    chunk: documents of fewer than 2 · ring · chunk rows stay whole where this leaves the ranks in balance.
    row_pairs: work that is the same for every row, in units of a pair of attending rows.

    Row sums are exactly ring_rows, column sums exactly the lengths. Documents are cut from the longest down, until
    attention work is in balance (max/mean ≤ GOOD_BALANCE); else the best that was found is taken.
    """
    lengths_D = np.asarray(lengths, dtype=np.int64)
    best, best_balance = np.zeros((ring, len(lengths_D) + 1), dtype=np.int64), np.inf
    while best_balance > GOOD_BALANCE:
        shares_RD = _shares(lengths_D, ring, ring_rows, lengths_D >= 2 * ring * chunk)
        found = balance(shares_RD, lengths_D, row_pairs)
        if found < best_balance:
            best, best_balance = shares_RD, found
        if chunk == 0:
            break
        chunk //= 2
    return best


def balance(shares_RD: np.ndarray, lengths_D: np.ndarray, row_pairs: float = 0.0) -> float:
    """Largest work of a ring rank over the mean, from shares `[ring, documents + 1]`; 1.0 when there is none."""
    row_cost_D = np.append((lengths_D + 1) / 2, 0.0) + row_pairs
    work_R = shares_RD @ row_cost_D
    return float(work_R.max() / work_R.mean()) if work_R.any() else 1.0


def _shares(lengths_D: np.ndarray, ring: int, ring_rows: int, cut_D: np.ndarray) -> np.ndarray:
    """The documents in cut_D divided over all ranks, the others whole where there is room."""
    shares_RD = np.zeros((ring, len(lengths_D) + 1), dtype=np.int64)
    cut = cut_D.copy()
    for number, rank in _whole(lengths_D, ring, ring_rows, cut_D).items():
        if rank is None:
            cut[number] = True
        else:
            shares_RD[rank, number] = lengths_D[number]
    room_R = ring_rows - shares_RD.sum(1)
    wanted_R = room_R / max(1, room_R.sum())
    owed_R = np.zeros(ring)
    # Shortest first: what rounding owes a rank is settled in the documents after it.
    for number in sorted(np.flatnonzero(cut).tolist(), key=lambda d: (lengths_D[d], d)):
        owed_R += lengths_D[number] * wanted_R
        rows_R = apportion(owed_R, room_R, int(lengths_D[number]))
        shares_RD[:, number] = rows_R
        room_R -= rows_R
        owed_R -= rows_R
    shares_RD[:, -1] = room_R
    return shares_RD


def _whole(lengths_D: np.ndarray, ring: int, ring_rows: int, cut_D: np.ndarray) -> dict[int, int | None]:
    """A rank for each document that is not to be cut, or None where there is no room for it.

    Longest processing time first (Graham 1969), where the load is what a document lacks against as many rows of the
    mixture (cut documents and padding) that all ranks are filled up with.
    """
    mixture_rows = ring * ring_rows - int(lengths_D[~cut_D].sum())
    mixture_pairs = int((lengths_D[cut_D] * (lengths_D[cut_D] + 1) // 2).sum())
    lack_D = lengths_D * (mixture_pairs / max(1, mixture_rows) - (lengths_D + 1) / 2)
    load_R, rows_R = np.zeros(ring), np.zeros(ring, dtype=np.int64)
    places: dict[int, int | None] = {}
    for number in sorted(np.flatnonzero(~cut_D).tolist(), key=lambda d: (-abs(lack_D[d]), d)):
        fits_R = rows_R + lengths_D[number] <= ring_rows
        if not fits_R.any():
            places[number] = None
            continue
        sign = 1.0 if lack_D[number] >= 0 else -1.0
        # Equal loads, as at the start: the emptiest of these ranks.
        rank = int(np.lexsort((rows_R, np.where(fits_R, sign * load_R, np.inf)))[0])
        places[number] = rank
        load_R[rank] += lack_D[number]
        rows_R[rank] += lengths_D[number]
    return places


def apportion(owed_R: np.ndarray, room_R: np.ndarray, total: int) -> np.ndarray:
    """Integers near owed_R, from 0 to room_R, whose sum is `total` (at most that of room_R): largest remainders."""
    rows_R = np.clip(np.floor(owed_R), 0, room_R).astype(np.int64)
    while (missing := total - int(rows_R.sum())) != 0:
        able_R = rows_R < room_R if missing > 0 else rows_R > 0
        gap_R = np.where(able_R, owed_R - rows_R, -np.inf if missing > 0 else np.inf)
        order_R = np.argsort(-gap_R if missing > 0 else gap_R, kind="stable")
        chosen_R = order_R[: min(abs(missing), int(able_R.sum()))]
        rows_R[chosen_R] += 1 if missing > 0 else -1
    return rows_R
