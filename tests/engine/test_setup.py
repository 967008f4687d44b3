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


@pytest.mark.parametrize("name", ["interleaved", "zb-h1", "zb-v"])
def test_schedules_that_only_the_simulator_runs(tmp_path: Path, name: str) -> None:
    config = load_config(write_config(tmp_path), [f"parallel.schedule={name}"])
    with pytest.raises(UserError) as caught:
        prepare(config, 1)
    assert str(caught.value) == (
        f"parallel.schedule: runs do not support '{name}' yet, only the simulator does; choose one of 1f1b, gpipe"
    )
