"""Checkpoints as a user of the command line meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import write_config
from tetrascope.engine.checkpoint import latest_checkpoint
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf


def train(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run as a process of its own."""
    command = [sys.executable, "-m", "tetrascope", "train", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "500"})


def test_each_save_is_exported_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    """The export at the end is off: what lies in hf/ is what the thread that saved has made, of the newest save."""
    config = write_config(tmp_path, train={"steps": 3, "save_every": 2}, output={"export_hf": False})
    run = train(config, "checkpoint.export_hf=true", "checkpoint.keep_last=2")
    assert run.returncode == 0, run.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000003"]
    newest = latest_checkpoint(checkpoints)
    assert newest is not None
    native_to_hf(newest, tmp_path / "again", "float32")
    exported = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name
    said = run.stdout + run.stderr
    assert f"saved {checkpoints / 'step-000002'} in" in said and f"done: {newest}" in said

    (newest / "state.json").write_text("{}")
    again = train(config, "train.steps=4", "--resume")
    assert again.returncode == 0, again.stderr
    said = again.stdout + again.stderr
    assert "step-000002, step 2; passed over step-000003 (state.json has 2 bytes" in said
