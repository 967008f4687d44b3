"""What a rank computes in the attention of one pack, and which rows travel: data, made once, for all layers.

Only keys and values of documents that are cut travel. They are the first thing a plan says (`travel`); blocks of later
ring steps, or those over gathered keys, refer to buffers of such rows. A pack whose documents all stay whole needs no
communication at all, and every rank knows so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet, Rows, one_set
from tetrascope.parallel.context.tokens import Block, TokenSharding

Exchange = Literal["ring", "gathered"]
"""How keys and values of other ring ranks are reached: piece by piece round the ring, or gathered at once."""

Steps: TypeAlias = tuple[tuple[BlockSet, ...], ...]


class AttentionPlan:
    """The attention of one ring rank over a sharded pack.

    sharding: where the rows lie. rank: this ring rank. The plan is the same for all ranks of a Ulysses group, all
    heads and all layers; what depends on the mask or the mode is made at its first use.
    """

    def __init__(self, sharding: TokenSharding, rank: int) -> None:
        self.sharding = sharding
        self.rank = rank
        self._made: dict[tuple[str, bool], Steps] = {}
        self._index: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def prepare(self, device: torch.device, exchange: Exchange, causal: bool = True) -> None:
        """Makes now what layers would make at first use, with the copies to the device that this takes."""
        steps = self.ring_steps(causal) if exchange == "ring" else self.gathered_steps(causal)
        for sets in steps:
            for blocks in sets:
                blocks.prepare(device)
        if self.travel_rows and not self.travel.contiguous:
            self.travel.index(device)
        if self.travel_rows and exchange == "gathered":
            self.gathered_index(device)

    @cached_property
    def cut(self) -> tuple[bool, ...]:
        """Of every document, whether it lies on several ring ranks; the padding, which comes last, never counts."""
        return (*(np.count_nonzero(self.sharding.shares_RD[:, :-1], axis=0) > 1).tolist(), False)

    @cached_property
    def _travelling(self) -> tuple[int, ...]:
        """Rows of documents that are cut, on each ring rank."""
        return tuple(sum(p.rows for p in pieces if self.cut[p.document]) for pieces in self.sharding.pieces)

    @property
    def travel_rows(self) -> int:
        """Rows of keys and values that every rank sends: as many as the rank that has most. 0: there is no ring."""
        return max(self._travelling)

    @cached_property
    def travel(self) -> Rows:
        """This rank's rows that travel; `travel_rows` of them at most."""
        return Rows([(p.row, p.rows) for p in self.sharding.pieces[self.rank] if self.cut[p.document]])

    def ring_steps(self, causal: bool) -> Steps:
        """Step 0: blocks of this rank's rows with each other. Step s: with the buffer of ring rank (rank - s) mod R."""
        return self._make("ring", causal, self._ring_steps)

    def _ring_steps(self, causal: bool) -> Steps:
        own, *others = self.sharding.ring_blocks(self.rank, causal)
        steps = [one_set(own)]
        for step, blocks in enumerate(others, start=1):
            # From rows of that rank to rows of its buffer: both list the same documents in the same order.
            pieces = [p for p in self.sharding.pieces[(self.rank - step) % self.sharding.ring] if self.cut[p.document]]
            rows = np.array([p.row for p in pieces], dtype=np.int64)
            places = np.array([0, *accumulate(p.rows for p in pieces)], dtype=np.int64)
            moved = []
            for block in blocks:
                i = int(np.searchsorted(rows, block.k_start, side="right")) - 1
                moved.append(block._replace(k_start=int(places[i] + block.k_start - rows[i])))
            steps.append(one_set(moved))
        return tuple(steps)

    def gathered_steps(self, causal: bool) -> Steps:
        """First: blocks of this rank's rows with each other. Then: with the keys of all documents that are cut, end to
        end, as `gathered_index` brings them into order: before, between and after the two chunks of this rank."""
        return self._make("gathered", causal, self._gathered_steps)

    def _gathered_steps(self, causal: bool) -> Steps:
        starts = [0, *accumulate(self.sharding.lengths)]  # in the pack
        places = [0, *accumulate(n if c else 0 for n, c in zip(self.sharding.lengths, self.cut, strict=False))]
        before, between, after = [], [], []
        for p in self.sharding.pieces[self.rank]:
            if not self.cut[p.document]:
                continue
            place, length = places[p.document], self.sharding.lengths[p.document]
            shift = place - starts[p.document]
            first, first_end = p.first_start + shift, p.first_start + p.first + shift
            second, second_end = p.second_start + shift, p.second_start + p.second + shift
            before.append(Block(p.row, p.rows, place, first - place, False))
            if causal:
                between.append(Block(p.row + p.first, p.second, first_end, second - first_end, False))
            else:
                between.append(Block(p.row, p.rows, first_end, second - first_end, False))
                after.append(Block(p.row, p.rows, second_end, place + length - second_end, False))
        sets = [s for blocks in (before, between, after) for s in one_set([b for b in blocks if b.q_rows and b.k_rows])]
        return one_set(self.sharding.ring_blocks(self.rank, causal)[0]), tuple(sets)

    def _make(self, kind: str, causal: bool, make: Callable[[bool], Steps]) -> Steps:
        if (kind, causal) not in self._made:
            self._made[kind, causal] = make(causal)
        return self._made[kind, causal]

    def gathered_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The way from the gathered buffers of keys and values to rows in order, and back.

        The ranks' buffers `[R, 2, travel_rows]` (0: keys, 1: values), seen as rows, taken at the first index
        `[2·cut rows]` are the keys, then the values, of the documents that are cut, end to end. The second
        `[R·2·travel_rows]` leads back; places that hold no row get row 2·cut rows, one past the end.
        """
        if device not in self._index:
            places, starts, total = [], [0, *accumulate(self.sharding.lengths)], len(self.sharding.order)
            for r, pieces in enumerate(self.sharding.pieces):
                rows = [
                    np.arange(start, start + count)
                    for p in pieces
                    if self.cut[p.document]
                    for start, count in ((p.first_start, p.first), (p.second_start, p.second))
                ]
                own = np.full(self.travel_rows, total, dtype=np.int64)
                if rows:
                    found = np.concatenate(rows)
                    own[: len(found)] = found
                places.append((r, own))
            kept = np.zeros(total + 1, dtype=np.int64)
            for d, cut in enumerate(self.cut[:-1]):
                kept[starts[d] : starts[d + 1]] = cut
            count = int(kept.sum())
            in_order = np.cumsum(kept) - kept  # pack row -> row among those of documents that are cut
            back = np.full((self.sharding.ring, 2, self.travel_rows), 2 * count, dtype=np.int64)
            for r, own in places:
                real = own < total
                for i in range(2):
                    back[r, i, real] = in_order[own[real]] + i * count
            flat = back.reshape(-1)
            order = np.empty(2 * count, dtype=np.int64)
            order[flat[flat < 2 * count]] = np.flatnonzero(flat < 2 * count)
            self._index[device] = (torch.from_numpy(order).to(device), torch.from_numpy(flat).to(device))
        return self._index[device]
