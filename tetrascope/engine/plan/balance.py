"""Sharing work of two kinds, decoder and vision, evenly: packs over data-parallel ranks, samples over packs.

Loads are in units of the fair share: 1 is what each group would have of a kind if it could be divided at will. What
is evened out is the larger of a group's two loads, since the group that is last in either kind holds up all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tetrascope.engine.plan.cost import Cost

PARTNERS = 8
"""How many of the least loaded groups are tried for a swap with the most loaded one."""

ROUNDS = 8
"""Swaps, for each group, before evening out ends for certain; it usually ends itself much earlier."""


def shares(costs: Sequence[Cost], groups: int) -> np.ndarray:
    """float64 `[n, 2]`: each cost relative to the fair share of a group. A kind of which there is nothing is zero."""
    # fsum: the same on every machine, in whatever order a vector unit would add.
    totals = [math.fsum(kind) for kind in zip(*costs, strict=True)]
    return np.array(costs, dtype=np.float64) * [groups / total if total else 0.0 for total in totals]


def to_ranks(costs: Sequence[Cost], ranks: int) -> list[list[int]]:
    """Deals packs to data-parallel ranks, as many to each; the number of packs must divide by that of the ranks.

    Longest processing time first (Graham 1969) on both kinds of load together, then swaps of a pack of the most
    loaded rank for one of another. Within a rank the packs are in the order of `pipeline_order`.
    """
    share_P2, each = shares(costs, ranks), len(costs) // ranks
    groups: list[list[int]] = [[] for _ in range(ranks)]
    load_R2 = np.zeros((ranks, 2))
    room_R = np.zeros(ranks)
    for pack in _heaviest_first(share_P2):
        rank = int(((load_R2 + share_P2[pack]).max(1) + room_R).argmin())
        groups[rank].append(pack)
        load_R2[rank] += share_P2[pack]
        if len(groups[rank]) == each:
            room_R[rank] = np.inf
    even_out(groups, share_P2)
    return [pipeline_order(group, share_P2) for group in groups]


def even_out(
    groups: list[list[int]], share_P2: np.ndarray, tokens_P: np.ndarray | None = None, capacity: int = 0
) -> None:
    """Swaps members, one for one and in place, as long as the most loaded group becomes lighter.

    With tokens_P, int64 `[n]`, no group comes to more than `capacity` of them.
    """
    load_G2 = np.array([_total(share_P2, group) for group in groups])
    tokens_G = np.array([0 if tokens_P is None else int(tokens_P[group].sum()) for group in groups])
    for _ in range(ROUNDS * len(groups)):
        heavy, kind = divmod(int(load_G2.argmax()), 2)
        peak = load_G2[heavy, kind]
        for light in np.argsort(load_G2[:, kind], kind="stable")[:PARTNERS].tolist():
            if light == heavy or load_G2[light, kind] >= peak:
                continue
            worst = np.full((len(groups[heavy]), len(groups[light])), -np.inf)  # load after each swap
            for k in range(2):
                moved = np.subtract.outer(share_P2[groups[heavy], k], share_P2[groups[light], k])
                np.maximum(worst, load_G2[heavy, k] - moved, out=worst)
                np.maximum(worst, load_G2[light, k] + moved, out=worst)
            if tokens_P is not None:
                grown = np.subtract.outer(tokens_P[groups[heavy]], tokens_P[groups[light]])
                fits = (tokens_G[light] + grown <= capacity) & (tokens_G[heavy] - grown <= capacity)
                worst = np.where(fits, worst, np.inf)
            a, b = divmod(int(worst.argmin()), len(groups[light]))
            if worst[a, b] >= peak - 1e-9:
                continue
            given, taken = groups[heavy][a], groups[light][b]
            groups[heavy][a], groups[light][b] = taken, given
            load_G2[heavy] += share_P2[taken] - share_P2[given]
            load_G2[light] += share_P2[given] - share_P2[taken]
            if tokens_P is not None:
                tokens_G[heavy] += tokens_P[taken] - tokens_P[given]
                tokens_G[light] += tokens_P[given] - tokens_P[taken]
            break
        else:
            return


def pipeline_order(packs: Sequence[int], share_P2: np.ndarray) -> list[int]:
    """The packs of a rank with the small ones at both ends and the largest in the middle.

    In a pipeline the later stages have nothing to do until the first micro-batch has come through all stages before
    them, and the earlier ones nothing while the last gradient goes back: both waits are as long as the first and the
    last micro-batches are large. Those in the middle overlap with each other.
    """
    front: list[int] = []
    back: list[int] = []
    for number, pack in enumerate(reversed(_heaviest_first(share_P2, packs))):
        (back if number % 2 else front).append(pack)
    return front + back[::-1]


def _heaviest_first(share_P2: np.ndarray, packs: Sequence[int] | None = None) -> list[int]:
    chosen = range(len(share_P2)) if packs is None else packs
    return sorted(chosen, key=lambda pack: (-float(share_P2[pack, 0] + share_P2[pack, 1]), pack))


def _total(share_P2: np.ndarray, group: Sequence[int]) -> tuple[float, float]:
    return math.fsum(share_P2[group, 0]), math.fsum(share_P2[group, 1])
