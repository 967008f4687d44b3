"""The command line as a user meets it: one message and exit code 2 for bad input, Ctrl-C, --resume, torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_config
from tetrascope.cli import main


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command that ends before it starts any rank."""
    monkeypatch.setattr(sys, "argv", ["tetrascope", *arguments])
    try:
        code = main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


BAD: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("unknown key", {"train": {"setps": 3}}, [], "unknown key 'train.setps'; did you mean 'train.steps'?"),
    ("unknown override", {}, ["paralel.tp=2"], "unknown key 'paralel'; did you mean 'parallel'?"),
    ("wrong type", {"train": {"steps": "many"}}, [], "'train.steps' is 'many': input should be a valid integer"),
    ("heads", {"parallel": {"tp": 4}}, [], "2 decoder key/value heads do not divide by tp=4; this model allows tp up"),
    ("layers", {"parallel": {"pp": 3}}, [], "need at least 3 decoder layers, the model has 2; lower parallel.pp"),
    ("split", {"parallel": {"pp": 2, "split": [2, 1]}}, [], "of at least 1 that add up to 2"),
    ("context parallel", {"parallel": {"ulysses": 3}}, [], "parallel.ulysses: 3 must divide the 4 attention heads"),
    ("schedule", {"parallel": {"schedule": "zb"}}, [], "parallel.schedule: unknown 'zb'; choose one of 1f1b, gpipe"),
    ("kernel", {"kernels": {"attention": "fa9"}}, [], "no kernel is called 'fa9'; choose one of auto, sdpa, reference"),
    ("family", {"model": {"family": "qwen9"}}, [], "unknown family 'qwen9'; known families: internvl, llava"),
    ("no data", {"data": {"train": "nowhere.jsonl"}}, [], "data.train: nowhere.jsonl does not exist"),
    ("no tokenizer", {"data": {"tokenizer": "nowhere"}}, [], "data.tokenizer: nowhere is not a folder"),
    ("no model", {"model": {"config": None}}, [], "give config (shapes) or preset (a published size), to train"),
    ("no folder", {"model": {"init_from": "here"}}, [], "here/config.json: cannot be read"),
    ("no folder to start from", {}, ["--init-from", "there"], "there/config.json: cannot be read"),
    ("output", {"output": {"dir": "/dev/null/run"}}, [], "output.dir: /dev/null/run cannot be written"),
    ("lr", {"optimizer": {"lr": -1}}, [], "'optimizer.lr' is -1: input should be greater than 0"),
]


@pytest.mark.parametrize(("sections", "overrides", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_configuration(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    sections: dict[str, Any],
    overrides: list[str],
    message: str,
) -> None:
    config = write_config(tmp_path, **sections)
    code, err = run_here(monkeypatch, capsys, "train", str(config), *overrides)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1 and "Traceback" not in err, err


def test_export_folder_that_is_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Found before the training, not after it."""
    config = write_config(tmp_path)
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "notes.txt").touch()
    code, err = run_here(monkeypatch, capsys, "train", str(config))
    assert (code, "exists and is no Hugging Face folder" in err) == (2, True)


def test_missing_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run_here(monkeypatch, capsys, "train", "nowhere.yaml")
    assert (code, err) == (
        2,
        "error: nowhere.yaml: cannot be read (No such file or directory); check the path of the configuration\n",
    )


def test_world_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config(tmp_path, parallel={"tp": 2, "pp": 2})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, err = run_here(monkeypatch, capsys, "train", str(config))
    assert code == 2
    assert "make 4 ranks, but 3 were started" in err


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tetrascope", *arguments]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "PYTHONPATH": root}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=180)


def test_corrupt_image_is_found_before_training(tmp_path: Path) -> None:
    """Found when the data is indexed, before any rank starts, and shown once."""
    config = write_config(tmp_path, parallel={"pp": 2})
    (tmp_path / "7.png").write_bytes(b"no picture")
    done = run(*_command("train", str(config)))
    assert done.returncode == 2, done.stderr
    assert "sample s7: image" in done.stderr
    assert "is not readable" in done.stderr and "replace it or remove the sample" in done.stderr
    assert done.stderr.count("sample s7") == 1 and "Traceback" not in done.stderr


def _steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, parallel={"tp": 2}, train={"steps": 100000})
    out = tmp_path / "run"
    process = subprocess.Popen(
        _command("train", str(config)), env=_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(_steps(out)) < 3:
        assert time.monotonic() < deadline and process.poll() is None, "training did not start"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "add --resume to the same command to go on" in err
    assert "Traceback" not in err
    taken = _steps(out)[-1]
    assert (out / "checkpoints" / f"step-{taken:06d}" / "state.json").exists()

    done = run(*_command("train", str(config), f"train.steps={taken + 2}", "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"step-{taken:06d}, step {taken}" in done.stderr
    assert _steps(out) == list(range(1, taken + 3))


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    """As the kernel does when memory runs out: nothing in the rank itself can report it."""
    config = write_config(tmp_path, parallel={"tp": 2}, train={"steps": 100000})
    process = subprocess.Popen(
        _command("train", str(config)), env=_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(_steps(tmp_path / "run")) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "training did not start"
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    ranks = [int(line.split()[0]) for line in children.stdout.splitlines() if " train " in line]
    assert len(ranks) == 2, children.stdout
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "was ended by signal 9 (out of memory?)" in err


def test_torchrun_and_export(tmp_path: Path) -> None:
    """The same configuration under torchrun; transformers loads the export, and converting again gives the same."""
    config = write_config(tmp_path, parallel={"tp": 2}, train={"steps": 2})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tetrascope"]
    done = run(*torchrun, "train", str(config))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert list((out / "tensorboard").iterdir())

    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(str(out / "hf"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(AutoTokenizer.from_pretrained(str(out / "hf"))) == model.config.text_config.vocab_size

    again = run(*_command("convert", str(out / "checkpoints" / "step-000002"), str(tmp_path / "again")))
    assert again.returncode == 0, again.stderr
    from safetensors.torch import load_file

    first, second = (load_file(str(folder / "model.safetensors")) for folder in (out / "hf", tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
