"""From a pool of samples to packs: micro-batches of at most so many tokens, with both kinds of work spread evenly.

Samples are never cut. What does not fit waits for the next step, and the older a sample is the surer it finds a place:

1. Samples that have waited `PATIENCE` steps come first, oldest first, each into the first pack with room.
2. The oldest others follow, up to almost the whole budget: pictures and videos, heaviest first, to the pack with the
   least vision work; then text, longest first, to the pack with the least decoder work.
3. The youngest fill what room is left, longest first; then samples are exchanged for longer ones that were left over,
   where that fills a pack better.

No sample waits more than `LONGEST_WAIT` steps. Let x be in its turn for rule 1 and find no place, for lack of room
that older samples took. First fit leaves any two packs with more than one pack's tokens between them, so that these
older samples come to more than floor(M/2) of M packs; with a single pack, those of two steps in a row come to more
than one pack, since the oldest that found no place in the first is placed in the second. All of them were in the pool
when x was, which never holds more than 1.05 M + 2 packs. So x finds no place in at most 7 steps (M = 1; in 5 with
more packs).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tetrascope.engine.plan.balance import even_out, shares
from tetrascope.engine.plan.cost import Cost

PATIENCE = 4
"""Steps after which a sample that waits goes before all younger ones."""

LONGEST_WAIT = PATIENCE + 7
"""No sample waits more steps than this."""

OWN_SHARE = 0.99
"""Part of the budget that is given to samples by age; the rest goes to whatever fills it best."""

GOOD_FILL = 0.98
"""Below this, filling the packs goes before spreading the work."""

SMALL_GAP = 0.002
"""Part of a pack that is not worth an exchange."""

DECODER_SAY = 0.25
"""How much the decoder's load counts when a picture is placed."""


@dataclass(frozen=True)
class Item:
    """A sample in the pool. position: in the stream. since: the step in which it first was there."""

    position: int
    since: int
    tokens: int
    cost: Cost


def pool_target(packs: int, capacity: int) -> int:
    """Tokens that the pool must exceed: the budget and, for a choice, 5 % of it and one pack."""
    return packs * capacity * 105 // 100 + capacity


def pack(items: Sequence[Item], step: int, packs: int, capacity: int) -> list[list[int]]:
    """Which items, by number, go into each pack; those in none are left over.

    items: in the order of their positions, more tokens than all packs hold together, none longer than a pack. Every
    pack gets at least one, since an item that is left over would fit an empty one.
    """
    overdue = [i for i, item in enumerate(items) if step - item.since >= PATIENCE]
    own, young = _by_age(items, set(overdue), OWN_SHARE * packs * capacity)
    table = _Packs(items, packs, capacity)
    table.place_all(overdue, table.first)
    visual, text = _kinds(items, own)
    table.place_all(visual, table.least_vision)
    table.place_all(text, table.least_decoder)
    table.place_all(_longest_first(items, [*table.left(own), *young]), table.least_decoder)
    table.top_up(set(overdue))
    if table.filled < GOOD_FILL:
        tight = _Packs(items, packs, capacity)
        tight.place_all(overdue, tight.first)
        tight.place_all(_longest_first(items, tight.left(range(len(items)))), tight.fullest)
        tight.top_up(set(overdue))
        table = tight if tight.filled > table.filled else table
    tokens = np.array([item.tokens for item in items], dtype=np.int64)
    even_out(table.packs, table.share_I2, tokens, capacity)
    return [sorted(members) for members in table.packs]


def spread(items: Sequence[Item], packs: int) -> list[list[int]]:
    """All items shared between the packs, however long these become.

    With at least as many items as packs every pack gets one: all have decoder work, and a pack without any comes first.
    """
    table = _Packs(items, packs, sum(item.tokens for item in items))
    visual, text = _kinds(items, range(len(items)))
    table.place_all(visual, table.least_vision)
    table.place_all(text, table.least_decoder)
    even_out(table.packs, table.share_I2)
    return [sorted(members) for members in table.packs]


class _Packs:
    """Packs being filled, with the load of each."""

    def __init__(self, items: Sequence[Item], packs: int, capacity: int) -> None:
        self._items, self._capacity = items, capacity
        self.share_I2 = shares([item.cost for item in items], packs)
        self.packs: list[list[int]] = [[] for _ in range(packs)]
        self._placed: set[int] = set()
        self._tokens = np.zeros(packs, dtype=np.int64)
        self._decoder, self._vision = np.zeros(packs), np.zeros(packs)

    @property
    def filled(self) -> float:
        """Part of the room that is taken."""
        return int(self._tokens.sum()) / (len(self.packs) * self._capacity)

    def left(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number not in self._placed]

    def place_all(self, numbers: Iterable[int], choose: Callable[[int], int | None]) -> None:
        """Puts items where `choose` says; those for which it finds no place stay out."""
        for number in numbers:
            chosen = choose(number)
            if chosen is not None:
                self.put(number, chosen)

    def put(self, number: int, chosen: int) -> None:
        self.packs[chosen].append(number)
        self._placed.add(number)
        self._tokens[chosen] += self._items[number].tokens
        self._decoder[chosen] += self.share_I2[number, 0]
        self._vision[chosen] += self.share_I2[number, 1]

    def _take(self, number: int, pack: int) -> None:
        self.packs[pack].remove(number)
        self._placed.remove(number)
        self._tokens[pack] -= self._items[number].tokens
        self._decoder[pack] -= self.share_I2[number, 0]
        self._vision[pack] -= self.share_I2[number, 1]

    def top_up(self, fixed: set[int]) -> None:
        """Exchanges items, but for the fixed ones, for longer ones that were left over, as long as there is a gap."""
        out = sorted((self._items[i].tokens, i) for i in self.left(range(len(self._items))))
        for pack in range(len(self.packs)):
            while (gap := self._capacity - int(self._tokens[pack])) > SMALL_GAP * self._capacity and out:
                best = (0, 0, -1)  # tokens gained, place in `out`, what goes out for it (-1: nothing)
                for length, inside in [(0, -1), *((self._items[i].tokens, i) for i in self.packs[pack])]:
                    place = bisect.bisect_right(out, (length + gap, len(self._items))) - 1
                    if place >= 0 and inside not in fixed:
                        best = max(best, (out[place][0] - length, place, inside))
                gained, place, inside = best
                if gained <= 0:
                    break
                self.put(out.pop(place)[1], pack)
                if inside >= 0:
                    self._take(inside, pack)
                    bisect.insort(out, (self._items[inside].tokens, inside))

    def first(self, number: int) -> int | None:
        """The first pack with room for an item."""
        return self._best(number, np.arange(len(self.packs), dtype=np.float64))

    def least_vision(self, number: int) -> int | None:
        """The pack with room that has the least vision work; the decoder's settles what is almost equal."""
        return self._best(number, self._vision + DECODER_SAY * self._decoder)

    def least_decoder(self, number: int) -> int | None:
        """The pack with room that has the least decoder work."""
        return self._best(number, self._decoder)

    def fullest(self, number: int) -> int | None:
        """The pack with room that has the least of it (best fit)."""
        return self._best(number, -self._tokens.astype(np.float64))

    def _best(self, number: int, score: np.ndarray) -> int | None:
        room = self._tokens <= self._capacity - self._items[number].tokens
        chosen = int(np.where(room, score, np.inf).argmin())
        return chosen if room[chosen] else None


def _by_age(items: Sequence[Item], taken: set[int], budget: float) -> tuple[list[int], list[int]]:
    """Splits those not taken into the oldest, as many as go into what the budget leaves, and the others."""
    used = sum(items[i].tokens for i in taken)
    own: list[int] = []
    rest = [i for i in range(len(items)) if i not in taken]
    for count, number in enumerate(rest):
        used += items[number].tokens
        if used > budget:
            return own, rest[count:]
        own.append(number)
    return own, []


def _kinds(items: Sequence[Item], numbers: Iterable[int]) -> tuple[list[int], list[int]]:
    """Those with vision work, heaviest first, and text, longest first."""
    visual = [i for i in numbers if items[i].cost.vision]
    text = [i for i in numbers if not items[i].cost.vision]
    visual.sort(key=lambda i: (-items[i].cost.vision, i))
    return visual, sorted(text, key=lambda i: (-items[i].cost.decoder, i))


def _longest_first(items: Sequence[Item], numbers: Iterable[int]) -> list[int]:
    return sorted(numbers, key=lambda i: (-items[i].tokens, i))
