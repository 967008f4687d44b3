"""The batch section: samples or tokens, never both, and micro-batches that the layout can deal out."""

from __future__ import annotations

from typing import Any

import pytest

from tetrascope.engine.config import BatchSection
from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"give either samples \(and micro_batches\), or tokens and pack"),
        ({"samples": 4, "tokens": 100, "pack": 50}, "give either samples"),
        ({"tokens": 100}, "give either samples"),
        ({"samples": 4, "pack": 50}, "give either samples"),
        ({"tokens": 130, "pack": 50}, "tokens must be a multiple of pack=50, for example 150"),
        ({"tokens": 10, "pack": 50}, "for example 50"),
        ({"tokens": 100, "pack": 50, "micro_batches": 2}, "remove micro_batches"),
        ({"samples": 4, "loss": "mean"}, "'loss' is 'mean': input should be 'token', 'sample' or 'sqrt'"),
    ],
)
def test_what_cannot_be(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validated(BatchSection, raw, "run.yaml")


def test_micro_batches_of_a_rank() -> None:
    tokens = validated(BatchSection, {"tokens": 600, "pack": 100}, "run.yaml")
    assert [tokens.per_rank(dp) for dp in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert BatchSection(samples=8, micro_batches=2).per_rank(4) == 2
    with pytest.raises(UserError, match=r"do not divide by parallel.dp=5; use dp of 1, 2, 3, 6, or batch.tokens=1000"):
        tokens.per_rank(5)


def test_what_a_checkpoint_keeps_can_be_read_again() -> None:
    for batch in (BatchSection(samples=4), BatchSection(tokens=200, pack=100, loss="sqrt")):
        assert validated(BatchSection, batch.model_dump(mode="json"), "state.json") == batch
