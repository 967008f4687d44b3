"""Heads that Ulysses can divide, and those that it replicates. Its numbers are tested in test_attend.py."""

from __future__ import annotations

import pytest

from tetrascope.errors import UserError
from tetrascope.parallel.context.attention import check_heads
from tetrascope.parallel.context.attention.ulysses import replicas


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "ulysses"),
    [
        (32, 8, 1, 8),
        (32, 8, 8, 4),  # one key head on a tensor-parallel rank, replicated for 4
        (32, 8, 1, 32),
        (28, 4, 1, 14),  # neither divides the other: every key head travels 7 times
        (28, 4, 4, 7),
        (12, 2, 2, 3),
        (16, 1, 1, 16),
    ],
)
def test_heads_that_divide(heads: int, kv_heads: int, tp: int, ulysses: int) -> None:
    check_heads(heads, kv_heads, tp, ulysses)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "ulysses", "message"),
    [
        (28, 4, 1, 8, r"parallel\.ulysses: 8 must divide the 28 attention heads.*choose 7 or 14.*parallel\.ring"),
        (28, 4, 4, 2, r"parallel\.ulysses: 2 must divide the 7 attention heads that tp=4 leaves.*choose 1 or 7"),
        (16, 16, 1, 32, r"parallel\.ulysses: 32 must divide.*choose 16, and"),
        (28, 4, 8, 1, r"parallel\.tp: 8 must divide the 28 attention heads and the 4 key heads; choose 4$"),
        (32, 8, 3, 1, r"parallel\.tp: 3 must divide.*choose 2 or 4$"),
    ],
)
def test_heads_that_do_not(heads: int, kv_heads: int, tp: int, ulysses: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_heads(heads, kv_heads, tp, ulysses)


@pytest.mark.parametrize(("kv_heads", "ulysses", "times"), [(8, 4, 1), (4, 4, 1), (2, 8, 4), (1, 4, 4), (4, 14, 7)])
def test_replicas(kv_heads: int, ulysses: int, times: int) -> None:
    assert replicas(kv_heads, ulysses) == times
