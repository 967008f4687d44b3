"""Bytes counted at the collectives against the formulas, in every mode and on every rank; docs show what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tetrascope.parallel.context.attention.links import Links
from tetrascope.tools.bench.bytes_jobs import Mode, counting, divide_pictures, picture_bytes
from tetrascope.tools.bench.context_bytes import (
    LAYER,
    PICTURES,
    attention_table,
    modes_of,
    picture_formula,
    picture_table,
)
from tetrascope.tools.verify.pool import WorkerPool

DOCS = Path(__file__).parents[3] / "docs" / "context-parallel.md"


def table_of(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_attention_sends_what_the_formulas_say(pool: WorkerPool) -> None:
    lines = attention_table(LAYER, pool)
    rows = table_of(lines)
    assert [row[1] for row in rows[-4:]] == ["ring 8", "gathered 8", "Ulysses 8", "ring 4 × Ulysses 2"]
    for _, mode, forward, forward_formula, backward, backward_formula, published in rows:
        assert forward == forward_formula and backward == backward_formula
        assert (published == backward) == (not mode.startswith("ring"))
    assert "\n".join(lines) in DOCS.read_text(encoding="utf-8")


def test_features_go_where_their_tokens_are(pool: WorkerPool) -> None:
    """The plan's own figure, the count and the pairs of encoder and owner, on every rank."""
    mode = Mode(2, 2)
    found = [rank[0] for rank in pool.run(picture_bytes, LAYER, PICTURES, [mode], world=4)]
    assert found == picture_formula(LAYER, PICTURES, mode)
    routes = divide_pictures(LAYER, PICTURES, mode)[2]
    assert [route.bytes_sent(PICTURES.width, 2) for route in routes] == [forward for forward, _ in found]
    lines = picture_table(LAYER, PICTURES, pool)
    for row in table_of(lines):
        assert row[2] == row[3] and row[4] == row[5]
    assert "\n".join(lines) in DOCS.read_text(encoding="utf-8")


def counted_alone() -> list[int]:
    """Bytes counted for one transfer of each kind between two ranks."""
    links, x, found = Links(dist.group.WORLD), torch.zeros(2, 3, dtype=torch.float32), []
    for transfer in (
        lambda: links.pass_on(x, "any")(),
        lambda: links.exchange(x, "any"),
        lambda: links.gather(x, "any")(),
        lambda: links.reduce_scatter(x, "any"),
    ):
        with counting() as counted:
            transfer()
        found.append(counted.bytes)
    return found


def test_counting(pool: WorkerPool) -> None:
    """24 bytes to the next rank; half of them in an all-to-all; a gather sends all, a reduce-scatter the other half."""
    assert pool.run(counted_alone, world=2) == [[24, 12, 24, 12]] * 2


@pytest.mark.parametrize(("ranks", "count"), [(2, 3), (4, 4)])
def test_modes(ranks: int, count: int) -> None:
    assert len(modes_of(ranks)) == count and all(mode.ranks == ranks for mode in modes_of(ranks))
