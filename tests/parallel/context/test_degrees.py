"""The automatic choice of ring and Ulysses: by hand for known machines and models, and valid for all others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention import check_heads
from tetrascope.parallel.context.degrees import context_degrees


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "tp", "node", "expected"),
    [
        (1, 28, 4, 1, 8, (1, 1)),
        (4, 28, 4, 1, 8, (1, 4)),  # all inside a node
        (8, 28, 4, 1, 8, (2, 4)),  # 28 heads divide by 4, not by 8
        (8, 32, 8, 1, 8, (1, 8)),
        (32, 32, 8, 1, 8, (4, 8)),  # four nodes: the ring across
        (16, 32, 8, 4, 8, (8, 2)),  # tp takes four ranks of each node
        (16, 32, 8, 8, 8, (16, 1)),
        (6, 32, 8, 1, 8, (3, 2)),
        (4, 12, 2, 1, 8, (1, 4)),  # more than there are key heads: they are replicated
        (9, 27, 9, 1, 8, (9, 1)),  # groups of 3 would cross the border of a node of 8
    ],
)
def test_choices(ranks: int, heads: int, kv_heads: int, tp: int, node: int, expected: tuple[int, int]) -> None:
    assert context_degrees(ranks, heads, kv_heads, tp, node) == expected


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(1, 16))
def test_every_choice_is_valid(ranks: int, kv: int, groups: int, tp: int, node: int) -> None:
    kv_heads = kv * tp
    ring, ulysses = context_degrees(ranks, kv_heads * groups, kv_heads, tp, node)
    assert ring * ulysses == ranks
    check_heads(kv_heads * groups, kv_heads, tp, ulysses)
    assert ulysses == 1 or node % (tp * ulysses) == 0


def test_tp_that_divides_no_heads_is_named() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp"):
        context_degrees(4, 28, 4, 3, 8)
