"""`tetrascope plan` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.tools.plan.plans import hardware, raw
from tetrascope.cli import app
from tetrascope.engine.predict import Hardware, load_hardware, save_hardware
from tetrascope.errors import UserError
from tetrascope.tools.plan import command
from tetrascope.tools.plan.command import Asked, plan


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw(batch={"samples": 16, "micro_batches": 4})))
    return file


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    file = tmp_path / "round.yaml"
    save_hardware(hardware(), file)
    return file


def test_a_plan_with_its_page(config: Path, profile: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "plan.html"
    options = ["--gpus", "4", "--hardware", str(profile), "--images", "0:0.5,2:0.5", "--top", "3", "--pick", "2"]
    ran = CliRunner().invoke(app, ["plan", str(config), *options, "--html", str(page), "model.preset=2b"])
    assert ran.exit_code == 0, ran.output
    assert "qwen2_vl on 4 × round" in ran.output
    assert "samples: 256 tokens of text and pictures of typical size: 50 % with 0, 50 % with 2" in ran.output
    assert "number 2 in a configuration:\nparallel: {tp: " in ran.output
    assert f"wrote {page}" in ran.output
    html = page.read_text()
    assert "<script" not in html and "http" not in html and "prefers-color-scheme: dark" in html
    assert html.count('<tr class="chosen">') == 1 and html.count("<svg") >= 3
    for part in ("<h2>Number 2: ", "Where a step's time goes", "Memory of a rank of each stage", "<h2>Left out</h2>"):
        assert part in html
    assert "nan" not in html


def test_what_is_measured_here_is_kept_and_planned_for(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pool:
        def __init__(self, size: int) -> None:
            assert size == 2

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, job: object, world: int) -> list[Hardware]:
            assert job is command._measure and world == 2
            return [hardware(), hardware()]

    monkeypatch.setattr(command, "WorkerPool", Pool)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    file = tmp_path / "here.yaml"
    assert plan(config, [], Asked(2, calibrate=file, top=1)) == 0
    assert load_hardware(str(file)).peak_flops == hardware().peak_flops
    assert "number 1 in a configuration" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(0, "cpu"), "--gpus: expected a number of at least 1, not 0"),
        (Asked(-8, "cpu"), "--gpus: expected a number of at least 1, not -8"),
        (Asked(8), "--hardware, --calibrate: give one of them"),
        (Asked(8, "cpu", Path("x.yaml")), "--hardware, --calibrate: give one of them"),
        (Asked(8, "h1000"), "h1000"),
        (Asked(8, "cpu", images="many"), "--images: 'many' is not of the form"),
    ],
)
def test_what_is_refused(config: Path, asked: Asked, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(config, [], asked)


def test_a_number_that_is_not_there(config: Path, profile: Path) -> None:
    with pytest.raises(UserError, match="--pick: there are numbers 1 to 1, not 2"):
        plan(config, [], Asked(1, str(profile), top=1, pick=2))


def test_a_page_that_cannot_be_written(config: Path, profile: Path) -> None:
    with pytest.raises(UserError, match=r"--html: .* cannot be written"):
        plan(config, [], Asked(1, str(profile), top=1, html=config / "plan.html"))


def test_the_configured_layout_does_not_matter(config: Path, profile: Path) -> None:
    assert plan(config, ["parallel.tp=3", "parallel.schedule=cost"], Asked(2, str(profile), top=1)) == 0
