"""`tetrascope bench train` as a user runs it: two ranks, a tiny model, a data set that is one global batch.

As every step takes all samples, tokens, images and FLOPs of a step are known without running anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import write_config
from tetrascope.engine import flops
from tetrascope.engine.config_file import load_config
from tetrascope.engine.setup import open_data, prepare
from tetrascope.errors import UserError
from tetrascope.tools.bench.command import bench_train

SAMPLES, WITH_IMAGE = 24, 20
MIB = 2**20


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_figures_of_a_run_on_two_ranks(tmp_path: Path) -> None:
    path = write_config(tmp_path, batch={"samples": SAMPLES})
    # A run's own checkpoint, a damaged one at that: the benchmark is not to look at it.
    kept = tmp_path / "run" / "checkpoints" / "step-000004" / "state.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("damaged")
    command = ["bench", "train", str(path), "parallel.tp=2", "--warmup", "2", "--steps", "3"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tetrascope", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    wall = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    kept_files = [name for name in files(tmp_path / "run") if not name.startswith("index/")]
    assert kept_files == ["bench.jsonl", "checkpoints/step-000004/state.json"]
    lines = (tmp_path / "run" / "bench.jsonl").read_text().splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])

    setup = prepare(load_config(path), None)
    infos = list(open_data(setup).indexes[0])
    tokens = [info.tokens for info in infos]
    media = [one for info in infos for one in info.media]
    _, language = flops.training_flops(setup.model_config, media, tokens)

    assert found["config"] == str(path)
    assert found["overrides"] == ["parallel.tp=2"]
    assert found["layout"] == {"pp": 1, "dp": 1, "ring": 1, "ulysses": 1, "tp": 2}
    settings = ("ranks", "device", "dtype", "threads", "warmup", "steps", "samples", "micro_batches")
    assert [found[name] for name in settings] == [2, "cpu", "float32", 1, 2, 3, SAMPLES, 2]
    assert found["torch"]
    assert found["device_name"]

    assert found["tokens_per_step"] == sum(tokens)
    assert found["images_per_step"] == WITH_IMAGE
    seconds = found["step_seconds"]
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert sum(seconds) < wall
    low, median, high = (found[f"step_seconds_{name}"] for name in ("p10", "median", "p90"))
    assert min(seconds) <= low <= median <= high <= max(seconds)
    assert found["tokens_per_second"] == pytest.approx(3 * sum(tokens) / sum(seconds))
    assert sum(tokens) / max(seconds) <= found["tokens_per_second"] <= sum(tokens) / min(seconds)
    assert found["images_per_second"] == pytest.approx(3 * WITH_IMAGE / sum(seconds))
    assert 0 <= found["data_wait_share"] < 1

    assert found["language_flops_per_step"] == language
    assert found["vision_flops_per_step"] > 0
    whole = found["vision_flops_per_step"] + found["language_flops_per_step"]
    assert found["flops_per_second"] == pytest.approx(3 * whole / sum(seconds))
    assert found["vision_flops_per_second"] + found["language_flops_per_second"] == pytest.approx(
        found["flops_per_second"]
    )
    by_rank = found["peak_flops_per_second_by_rank"]
    assert len(by_rank) == 2
    assert min(by_rank) > 1e7  # any processor multiplies faster than 10 million numbers a second
    assert found["peak_flops_per_second"] == pytest.approx(sum(by_rank))
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / found["peak_flops_per_second"])
    assert 0 < found["mfu"] < 1

    memory = found["memory_by_rank"]
    assert len(memory) == 2
    assert (found["memory_min"], found["memory_max"]) == (min(memory), max(memory))
    assert min(memory) > 100 * MIB  # torch alone is that large; a mistake in the unit is a factor of 1024
    assert max(memory) < 100_000 * MIB

    assert "qwen2_vl on TP2: 3 steps after 2 of warm-up" in done.stdout
    for row in ("tokens/s", "images/s", "waiting for data", "vision", "language", "MFU", "peak memory"):
        assert row in done.stdout


def test_a_file_that_cannot_be_written_is_refused_before_ranks_start(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with pytest.raises(UserError, match=r"data: cannot be written \(Is a directory\); give another file with --json"):
        (tmp_path / "data").mkdir()
        bench_train(path, [], 1, 1, tmp_path / "data")
