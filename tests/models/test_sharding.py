"""Sharding tables: exactly one rule for a module."""

from __future__ import annotations

import pytest

from tetrascope.errors import UserError
from tetrascope.models.sharding import Replicated, Row, ShardingTable, Vocab, rule_for

TABLE: ShardingTable = [
    (r"embed", Vocab()),
    (r"layers\.\d+\.down", Row()),
    (r"layers\.\d+\..*", Replicated()),
]


def test_the_rule_that_matches_the_whole_name() -> None:
    assert rule_for(TABLE, "embed") == Vocab()
    assert rule_for(TABLE, "layers.12.norm") == Replicated()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("head", "no rule for module 'head'"),
        ("vision.embed", "no rule for module 'vision.embed'"),  # a part of the name is no match
        ("embed.inner", "no rule for module 'embed.inner'"),
        ("layers.0.down", r"2 rules \(layers.*down, layers.*\) for module 'layers.0.down'"),
    ],
)
def test_none_or_several_are_errors_that_name_the_module(module: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rule_for(TABLE, module)
