"""What is checked before any process group."""

from __future__ import annotations

from tetrascope.engine.setup import _merged


def test_changes_reach_single_keys_inside_sections() -> None:
    base = {"decoder": {"hidden": 8, "layers": 2}, "rule": "paper", "section": (1, 2)}
    changed = _merged(base, {"decoder": {"layers": 3}, "rule": "hf", "section": [2, 1]})
    assert changed == {"decoder": {"hidden": 8, "layers": 3}, "rule": "hf", "section": [2, 1]}
    assert base["decoder"] == {"hidden": 8, "layers": 2}
    assert _merged(base, {"decoder": 5})["decoder"] == 5, "left to the validation, which names the field"
