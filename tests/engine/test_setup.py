"""What is checked before any process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import write_config
from tetrascope.engine import setup
from tetrascope.engine.config import load_config
from tetrascope.engine.setup import _merged, prepare
from tetrascope.errors import UserError


def test_changes_reach_single_keys_inside_sections() -> None:
    base = {"decoder": {"hidden": 8, "layers": 2}, "rule": "paper", "section": (1, 2)}
    changed = _merged(base, {"decoder": {"layers": 3}, "rule": "hf", "section": [2, 1]})
    assert changed == {"decoder": {"hidden": 8, "layers": 3}, "rule": "hf", "section": [2, 1]}
    assert base["decoder"] == {"hidden": 8, "layers": 2}
    assert _merged(base, {"decoder": 5})["decoder"] == 5, "left to the validation, which names the field"


def test_a_folder_of_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    config = load_config(write_config(tmp_path), [f"model={{family: qwen2_vl, init_from: {folder}}}"])
    with pytest.raises(UserError, match=r"no family knows a model with architectures \['BertModel'\] and model_type"):
        prepare(config, 1)
    monkeypatch.setattr(setup, "family_of", lambda raw: "other")
    with pytest.raises(UserError, match=r"model\.family: .* is of family 'other', not 'qwen2_vl'; set model\.family=o"):
        prepare(config, 1)
