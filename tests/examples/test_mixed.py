"""The mixed example: what prepare.py writes, and that its configuration plans as evenly as promised."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tetrascope.engine.config_file import load_config
from tetrascope.engine.data.mixture import Mixture
from tetrascope.engine.data.video import decode, probe
from tetrascope.engine.modules import trained
from tetrascope.engine.plan import CostModel, Planner, report
from tetrascope.engine.setup import prepare as prepare_run
from tetrascope.tools.data.sources import index_folder

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mixed"


def load_script() -> ModuleType:
    """prepare.py as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location("mixed_prepare", EXAMPLE / "prepare.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {EXAMPLE / 'prepare.py'}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


prepare = load_script()
FEW = prepare.Settings(text=3, image=4, several=3, video=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example's relative paths hold."""
    folder = tmp_path_factory.mktemp("home")
    assert prepare.main(["--out", str(folder / "runs/mixed/data")]) == 0
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_small_and_made_of_what_it_says(home: Path) -> None:
    data = home / "runs/mixed/data"
    assert sum(len(content) for content in files_below(data).values()) < 20e6
    kinds = {}
    for name in ("text", "image", "several", "video"):
        counts = [
            [part["type"] for part in row["messages"][0]["content"]].count("video" if name == "video" else "image")
            for row in rows(data / f"{name}.jsonl")
        ]
        kinds[name] = (len(counts), min(counts), max(counts))
    assert kinds == {"text": (400, 0, 0), "image": (240, 1, 1), "several": (120, 2, 5), "video": (80, 1, 1)}
    sizes = [Image.open(path).size for path in sorted((data / "images").iterdir())]
    shapes = np.array([width / height for width, height in sizes])
    assert len(set(sizes)) > 300 and shapes.min() < 0.3 and shapes.max() > 3


def test_same_settings_same_files(tmp_path: Path) -> None:
    assert prepare.prepare(tmp_path / "a", FEW) and prepare.prepare(tmp_path / "b", FEW)
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
    assert not prepare.prepare(tmp_path / "a", FEW)
    assert prepare.prepare(tmp_path / "a", prepare.Settings(text=3, image=4, several=3, video=4, seed=1))
    assert files_below(tmp_path / "a") != files_below(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("move", prepare.MOVES)
def test_the_camera_moves_as_it_is_said_to(move: str) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        begin, end = (np.array(box) for box in prepare.path_of(move, 640, 427, rng.uniform(0.5, 2), rng))
        for box in (begin, end):
            assert 0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 427
        grown, moved = np.ptp(end[[0, 2]]) / np.ptp(begin[[0, 2]]), end[0] - begin[0]
        if move.startswith("zooms"):
            assert (grown < 0.7) if move == "zooms in" else (grown > 1.4)
        else:
            assert grown == pytest.approx(1) and (moved > 0) == (move == "pans to the right") and end[1] == begin[1]


def test_videos_are_as_long_as_they_should_be_and_move(home: Path) -> None:
    data = home / "runs/mixed/data"
    for row in rows(data / "video.jsonl")[:6]:
        path = data / row["messages"][0]["content"][0]["video"]
        info = probe(path)
        assert info.fps == prepare.FRAMES_A_SECOND and 2 <= info.seconds <= 6
        first, last = decode(path, [0, info.frames - 1])
        assert first.size == last.size == (info.width, info.height)
        assert np.abs(np.asarray(first, float) - np.asarray(last, float)).mean() > 5


def test_answers_about_pictures_are_true(home: Path) -> None:
    data = home / "runs/mixed/data"
    for row in rows(data / "image.jsonl")[:40]:
        with Image.open(data / row["messages"][0]["content"][0]["image"]) as picture:
            for turn in row["messages"]:
                if "pixels" in str(turn["content"]):
                    assert turn["content"] == f"It is {picture.width} pixels wide and {picture.height} high."


def test_planned_evenly_over_8_ranks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of ten steps, not their mean: 8 ranks with 16 micro-batches each."""
    monkeypatch.chdir(home)
    config = load_config(EXAMPLE / "config.yaml", ["parallel.dp=8"])
    setup = prepare_run(config, None)
    mixture = Mixture(config.data, setup.family, setup.model_config, setup.tokenizer, index_folder(config))
    assert len(mixture) == 840 and not any(index.bad for index in mixture.indexes)
    cost = CostModel(setup.model_config, trained(setup.modules))
    planner = Planner(mixture.for_planner(), config.train.seed, setup.layout, config.batch, cost)
    assert config.batch.per_rank(8) == 16
    for step in range(10):
        found = report(planner, planner.plan(step))
        assert found.planned.efficiency >= 0.98
        assert found.planned.ranks.decoder <= 1.05 and found.planned.ranks.vision <= 1.15
        assert found.naive.ranks.vision > 1.15  # what arrival order would have given
