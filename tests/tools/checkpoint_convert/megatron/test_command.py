"""`tetrascope convert` to Megatron and back, as a user calls it, and how much memory it takes."""

from __future__ import annotations

import filecmp
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tools.checkpoint_convert.megatron.cases import causal_lm, token_ids, write_causal_lm
from tetrascope.cli import main
from tetrascope.tools.verify.families import llava, qwen2_vl


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tetrascope", "convert", *map(str, arguments)])
    try:
        return main()
    except SystemExit as end:
        return int(end.code or 0)


def write_vlm(module: Any, folder: Path) -> Path:
    case = module.make_case()
    model = module.oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[module.name_on_disk(name)])
    model.save_pretrained(folder)
    return folder


def test_a_whole_folder_comes_back_file_by_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hf = write_vlm(llava, tmp_path / "hf")
    layout = "transformers-5"  # what save_pretrained of a model that was not loaded writes
    assert command(monkeypatch, hf, tmp_path / "megatron", "--to", "megatron", "--verify") == 0
    assert command(monkeypatch, tmp_path / "megatron", tmp_path / "back", "--layout", layout, "--verify") == 0
    names = sorted(path.name for path in hf.iterdir())
    assert filecmp.cmpfiles(hf, tmp_path / "back", names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "qwen3"])
def test_a_language_model_from_megatron_is_loaded_by_transformers(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    hf = write_causal_lm(kind, tmp_path / "hf")
    assert command(monkeypatch, hf, tmp_path / "megatron", "--to", "megatron") == 0
    # As if Megatron had saved it: only its own files.
    release = tmp_path / "megatron/release"
    (release / "tetrascope.json").unlink()
    for path in (release / "hf").iterdir():
        path.unlink()
    assert command(monkeypatch, tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, causal_lm(kind)(token_ids()).logits)


def test_a_language_model_taken_out_of_a_vision_language_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf = write_vlm(qwen2_vl, tmp_path / "hf")
    out = tmp_path / "megatron"
    assert command(monkeypatch, hf, out, "--to", "megatron") != 0
    assert "write its language model alone, a GPTModel" in " ".join(capfd.readouterr().err.split())
    assert not out.exists()
    assert command(monkeypatch, hf, out, "--to", "megatron", "--allow", r"visual\..*", "--verify") == 0
    # Without what says that it was Qwen2-VL, it is the Qwen2 that Megatron's arguments describe.
    (out / "release/tetrascope.json").unlink()
    for path in (out / "release/hf").iterdir():
        path.unlink()
    assert command(monkeypatch, out, tmp_path / "qwen2", "--verify") == 0
    config = json.loads((tmp_path / "qwen2/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    tensors, whole = load_file(tmp_path / "qwen2/model.safetensors"), qwen2_vl.make_case().weights
    assert tensors.keys() == {name for name in whole if not name.startswith("visual.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
