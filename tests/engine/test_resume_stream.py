"""A run that is killed again and again, each time resumed in another layout, takes the samples of one that never was.

The oracle is a run on one rank without a break, and beside it a plain count: no place of the stream is taken twice,
none is left out but those that the last checkpoint says still wait, and of every source every sample comes once an
epoch. A cursor that forgot what waits, counted steps of a killed run, or depended on the layout would show in both.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.engine.stream_jobs import run_and_end
from tests.tiny import write_config
from tetrascope.tools.verify.pool import RankFailure, WorkerPool

SIZES = {"train": 24, "small": 5, "shard": 9}
STEPS = 14
LIVES = [
    ([], 1, 2, 4, "stop"),
    (["parallel.dp=2"], 2, 5, 5, "kill"),
    (["parallel.tp=2"], 2, 7, 9, "stop"),
    (["parallel.pp=2"], 2, 10, 10, "stop"),
    (["parallel.dp=2", "data.workers=1"], 2, STEPS, None, ""),
]
"""Layout, ranks, step of the checkpoint, step in whose middle the run ends (at once, or after others), and how: with
SIGKILL to a rank, or, which costs the test less, by going no further on any."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Three sources of unlike weight and size, so that each is in another epoch; one picture cannot be decoded."""
    path = write_config(tmp_path)
    picture = tmp_path / "7.png"
    picture.write_bytes(picture.read_bytes()[:-2000])
    with (tmp_path / "small.jsonl").open("w") as lines:
        for i in range(SIZES["small"]):
            turns = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"well, {i} " * (i + 1)}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(SIZES["shard"]):
            image = io.BytesIO()
            Image.fromarray(np.full((56, 56 + 28 * (i % 3), 3), 20 * i, dtype=np.uint8)).save(image, "png")
            for name, data in (("png", image.getvalue()), ("txt", f"it is number {i}".encode())):
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    raw = yaml.safe_load(path.read_text())
    del raw["data"]["train"]
    raw["data"] |= {"max_bad_samples": 1, "index_dir": str(tmp_path / "index")}
    raw["data"]["sources"] = [
        {"path": str(tmp_path / "train.jsonl"), "weight": 3},
        {"path": str(tmp_path / "small.jsonl"), "weight": 1.5},
        {"path": str(tmp_path / "shard.tar"), "weight": 2, "shuffle": "blocks"},
    ]
    path.write_text(yaml.safe_dump(raw))
    return path


Draws = list[tuple[int, str, int, int]]


def _taken(log: Path, first: int, stop: int) -> list[Draws]:
    """Of each step from `first` to before `stop`, what all ranks took in the life that wrote `log`."""
    steps: dict[int, Draws] = {step: [] for step in range(first, stop)}
    for file in sorted(log.parent.glob(f"{log.name}.*")):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            if step in steps:
                steps[step] += [tuple(row) for row in rows]
    return [sorted(draws) for draws in steps.values()]


@pytest.mark.parametrize(
    "batch", ["{samples: 8, micro_batches: 2}", "{tokens: 640, pack: 160}"], ids=["samples", "tokens"]
)
def test_no_sample_is_lost_or_repeated(pool: WorkerPool, config: Path, tmp_path: Path, batch: str) -> None:
    common = [f"batch={batch}"]
    whole_run = [*common, f"output.dir={tmp_path / 'whole'}"]
    pool.run(run_and_end, config, whole_run, STEPS, None, "", tmp_path / "whole-log", False, world=1)
    whole = _taken(tmp_path / "whole-log", 0, STEPS)

    lived: list[Draws] = []
    for number, (layout, world, save_at, end_at, how) in enumerate(LIVES):
        log = tmp_path / f"life-{number}"
        job = (config, [*common, *layout, f"output.dir={tmp_path / 'cut'}"], save_at, end_at, how, log, number > 0)
        with pytest.raises(RankFailure, match="killed by signal 9") if how == "kill" else nullcontext():
            pool.run(run_and_end, *job, world=world)
        if end_at is not None:
            assert all(_taken(log, len(lived), end_at + 1)), "it ended before it took what was to be repeated"
        lived += _taken(log, len(lived), save_at)
    assert lived == whole

    state = json.loads((tmp_path / "cut" / "checkpoints" / f"step-{STEPS:06d}" / "state.json").read_text())
    waiting = [position for position, _ in state["cursor"]["waiting"]]
    draws = sorted(draw for step in lived for draw in step)
    assert sorted([position for position, *_ in draws] + waiting) == list(range(state["cursor"]["position"]))
    assert bool(waiting) == ("tokens" in batch), "nothing waited, so nothing of it was tested"
    for name, size in SIZES.items():
        epochs = Counter(epoch for _, source, _, epoch in draws if source == name)
        assert len(epochs) >= 2, "too few steps for a whole epoch"
        for epoch in epochs:
            samples = [sample for _, source, sample, of in draws if (source, of) == (name, epoch)]
            assert len(set(samples)) == len(samples), f"{name}: a sample twice in epoch {epoch}"
            if epoch < max(epochs) - 1:  # what waits is of the last two
                assert sorted(samples) == list(range(size)), f"{name}: not every sample in epoch {epoch}"
