"""The comparison of attentions: what it measures must be right on every side, or its times mean nothing."""

from __future__ import annotations

import pytest

from tetrascope.errors import UserError
from tetrascope.tools.bench.attention import LIMIT, compare_attention, main, sides_for, table
from tetrascope.tools.bench.attention_sides import Work
from tetrascope.tools.verify.pool import WorkerPool


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_every_side_computes_the_same(pool: WorkerPool, heads: tuple[int, int]) -> None:
    """Bound: fp32 rounding over 96 keys; largest seen 4e-7."""
    work = Work(96, heads, 16, "float32", 4)
    found = compare_attention(work, sides_for(work), 2, pool)
    assert [side.name for side in found] == [
        LIMIT,
        "ours: ring 4",
        "ours: gathered 4",
        "ours: Ulysses 4",
        "ours: ring 2 × Ulysses 2",
        "torch: ring 4, all-gather",
        "torch: ring 4, all-to-all",
    ]
    assert found[0].error is None
    assert all(side.error is not None and side.error <= 2e-6 for side in found[1:])
    assert all(len(times) == 2 and min(times) > 0 for side in found for times in (side.seconds, side.busy))
    assert table(work, found).row_count == 7


def test_two_ranks_have_no_two_by_two() -> None:
    names = [name for name, _ in sides_for(Work(96, (4, 4), 16, "float32", 2), ours_only=True)]
    assert names == [LIMIT, "ours: ring 2", "ours: gathered 2", "ours: Ulysses 2"]


def test_what_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"100 do not divide by 8, take --rows 104"):
        sides_for(Work(100, (4, 4), 16, "float32", 4))
    with pytest.raises(UserError, match=r"parallel\.ulysses: 4 must divide the 6 attention heads.*3 or 6"):
        sides_for(Work(96, (6, 2), 16, "float32", 4))


def test_command_line_refuses_what_cannot_be_divided(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--rows", "100"])
    assert "take --rows 104" in capsys.readouterr().err
