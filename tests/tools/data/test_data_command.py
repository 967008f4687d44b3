"""`tetrascope data` as a user meets it: what it prints, finds again, indexes anew and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.tiny import write_config
from tetrascope.cli import app
from tetrascope.errors import UserError
from tetrascope.tools.data.command import data_index, data_inspect, data_plan


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def add(file: Path, *lines: str) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in lines)


def conversation(*parts: object, answer: str = "yes") -> str:
    messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": "added", "messages": messages})


TEXT = {"type": "text", "text": "is <script>alert(1)</script> text?"}


def test_index_is_made_then_found_then_made_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_index(run, [], None, None, None) == 0
    first = capsys.readouterr().out
    assert re.match(
        r"train: 24 samples, [\d,]+ tokens \([\d,]+ supervised, [\d,]+ visual\), 20 images, 0 videos\n", first
    )
    assert re.search(r"train-[0-9a-f]{16}\.parquet \([\d.]+ KiB\), made in \d+\.\d s\n", first)
    (kept,) = (run.parent / "run" / "index").glob("*.parquet")
    assert str(kept) in first

    assert data_index(run, [], None, None, None) == 0
    assert "found unchanged in" in capsys.readouterr().out

    kept.write_bytes(b"damaged")
    assert data_index(run, [], None, None, None) == 0
    assert "made in" in capsys.readouterr().out

    add(run.parent / "train.jsonl", conversation(TEXT))
    assert data_index(run, [], None, None, None) == 0
    again = capsys.readouterr().out
    assert again.startswith("train: 25 samples")
    assert re.search(r"content or settings changed since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, indexed again in", again)


def test_too_many_bad_samples_end_with_1_and_are_named_by_kind(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = conversation({"type": "image", "image": "gone.png"}, TEXT)
    add(run.parent / "train.jsonl", missing, missing, "{")
    assert data_index(run, [], None, None, None) == 1
    shown = capsys.readouterr()
    assert "left out: 3 (missing file: 2, bad json: 1)" in shown.out
    assert "gone.png does not exist" in shown.out and "train.jsonl:27: not valid JSON" in shown.out
    assert "data.max_bad_samples" in shown.err
    assert data_index(run, ["data.max_bad_samples=3"], None, None, None) == 0


def test_single_sources_and_their_names(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run.parent / "train.jsonl")
    both = ["data.train=null", f"data.sources=[{{path: {path}, name: a}}, {{path: {path}, name: a-b, weight: 2}}]"]
    assert data_index(run, both, None, "a-b", None) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a-b: 24 samples") and "\na: " not in shown
    assert data_index(run, both, None, None, 1) == 0
    shown = capsys.readouterr().out
    assert "a: 24 samples" in shown and "found unchanged" in shown and "changed since" not in shown
    with pytest.raises(UserError, match=r"--source: there is no 'c'; the sources are a, a-b"):
        data_index(run, both, None, "c", None)


def test_a_data_file_takes_the_place_of_the_runs_sources(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parent / "two: other.jsonl"
    other.write_text(conversation(TEXT) + "\n" + conversation(TEXT, answer="no") + "\n")
    assert data_index(other, [], run, None, None) == 0
    assert capsys.readouterr().out.startswith("train: 2 samples")
    mixture = yaml.safe_load(run.read_text())
    mixture["data"]["sources"] = [{"path": mixture["data"].pop("train")}]
    run.write_text(yaml.safe_dump(mixture))
    assert data_index(other, [], run, None, None) == 0
    assert "train: 2 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="--config"):
        data_index(other, [], None, None, None)


def test_inspect_shows_histograms_and_samples_and_writes_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = run.parent / "train.jsonl"
    train.write_text(train.read_text().splitlines()[1] + "\n" + conversation(TEXT) + "\n{\n")
    html = run.parent / "new" / "page.html"
    assert data_inspect(run, [], html, samples=5, seed=0) == 0
    shown = capsys.readouterr().out
    for title in ("Tokens per sample (tokens)", "Image width (pixels)", "Vision work per sample"):
        assert title in shown
    assert "train: added" in shown and "<script>alert(1)</script>" in shown
    assert re.search(r" image \d+ tokens ", shown) and "left out: 1 (bad json: 1)" in shown
    page = html.read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in re.sub(r"</?span[^>]*>", "", page)
    assert page.count("data:image/jpeg;base64,") == 1 and "train.jsonl:3: not valid JSON" in page
    with pytest.raises(UserError, match="--html"):
        data_inspect(run, [], train / "page.html", samples=0, seed=0)


def test_a_sample_that_is_gone_is_said_to_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_index(run, [], None, None, None) == 0
    (run.parent / "1.png").unlink()
    assert data_inspect(run, [], None, samples=24, seed=0) == 0
    assert "1.png does not exist" in capsys.readouterr().out


def test_several_sources_are_shown_together_and_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run.parent / "train.jsonl")
    both = ["data.train=null", f"data.sources=[{{path: {path}, name: one}}, {{path: {path}, name: two}}]"]
    assert data_inspect(run, both, None, samples=2, seed=0) == 0
    shown = capsys.readouterr().out
    assert [shown.index(f" {name} ──") for name in ("all sources", "one", "two")]
    assert shown.count("Tokens per sample") == 3
    assert re.search(r"^one: s\d+, \d+ tokens", shown, re.M) and re.search(r"^two: s\d+, \d+ tokens", shown, re.M)


def test_plan_reads_no_sample_beyond_the_index(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_index(run, [], None, None, None) == 0
    for picture in run.parent.glob("*.png"):
        picture.unlink()
    assert data_plan(run, [], 2, 3) == 0
    shown = capsys.readouterr().out
    assert "3 steps, DP 2, 2 micro-batches a rank" in " ".join(shown.split())
    for line in ("packing efficiency", "decoder: max / mean of ranks", "vision: max / mean of micro-batches"):
        assert line in shown
    assert "naive" in shown and re.search(r"24 samples planned in \d+\.\d+ ms each", shown)
    assert "gone through: train 1.00 times" in shown


def test_command_line_hands_everything_on(run: Path) -> None:
    other = run.parent / "other.jsonl"
    other.write_text((conversation(TEXT) + "\n") * 3)
    lines = {
        ("index", str(other), "--config", str(run), "--source", "train", "--workers", "1"): "train: 3 samples",
        ("inspect", str(run), "--samples", "1", "--seed", "3", "--html", str(run.parent / "x.html")): "wrote",
        ("plan", str(run), "train.seed=3", "--dp", "4", "--steps", "2"): "2 steps, DP 4",
    }
    for line, expected in lines.items():
        found = CliRunner().invoke(app, ["data", *line])
        assert found.exit_code == 0 and expected in " ".join(found.output.split()), found.output
    assert (run.parent / "x.html").is_file()
    none_left = CliRunner().invoke(app, ["data", "index", str(run), "data.max_tokens=20"])
    assert isinstance(none_left.exception, UserError) and "none of the 24 samples" in str(none_left.exception)
