"""Which checkpoints are found, kept and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrascope.engine.checkpoint.files import write_file
from tetrascope.engine.checkpoint.folders import checkpoints, kept, latest_checkpoint, prune, tidy
from tetrascope.engine.checkpoint.manifest import MANIFEST, read_manifest, shares, write_manifest


def make(folder: Path, name: str, content: str = "") -> Path:
    """A folder with one file and its manifest."""
    path = folder / name
    path.mkdir()
    write_manifest(path, {"file": write_file(path / "file", content.encode())})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_checkpoint_is_the_whole_one_of_the_highest_step(tmp_path: Path) -> None:
    for name in ("step-999000", "step-1000000", "step-2000000-copy", "step-zzz", ".step-4000000.partial"):
        make(tmp_path, name)
    (tmp_path / "step-3000000").mkdir()  # no manifest: not whole
    assert list(checkpoints(tmp_path)) == [999000, 1000000, 3000000]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"
    assert latest_checkpoint(tmp_path / "nowhere") is None


@given(
    steps=st.sets(st.integers(0, 60), min_size=1),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    data=st.data(),
)
def test_what_is_kept(steps: set[int], keep_last: int, keep_every: int | None, data: st.DataObject) -> None:
    written = data.draw(st.sampled_from(sorted(steps)))
    staying = kept(steps, written, keep_last, keep_every)
    assert staying <= steps
    assert written in staying and max(steps) in staying
    for step in steps:
        newer = sum(other > step for other in steps)
        wanted = step == written or newer < keep_last or (keep_every is not None and step % keep_every == 0)
        assert (step in staying) == wanted


def test_deletion_keeps_the_last_every_so_many_and_what_is_not_whole(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        make(tmp_path, f"step-{step:06d}")
    (tmp_path / "step-000030" / "file").unlink()
    gone = prune(tmp_path, 70, keep_last=2, keep_every=40)
    assert [path.name for path in gone] == ["step-000010", "step-000020", "step-000050"]
    assert names(tmp_path) == ["step-000030", "step-000040", "step-000060", "step-000070"]


def test_the_only_whole_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    """Newer ones that are damaged do not count as the last."""
    whole = make(tmp_path, "step-000010")
    for step in (20, 30):
        (make(tmp_path, f"step-{step:06d}") / "file").write_text("longer")
    assert prune(tmp_path, 10, keep_last=1, keep_every=None) == []
    assert latest_checkpoint(tmp_path) == whole


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of deleting: what is left has no checkpoint's name, and goes at the next start."""
    for step in (10, 20):
        make(tmp_path, f"step-{step:06d}")
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: (path / MANIFEST).unlink(missing_ok=True))
    prune(tmp_path, 20, keep_last=1, keep_every=None)
    assert names(tmp_path) == [".step-000010.deleted", "step-000020"]
    monkeypatch.undo()
    tidy(tmp_path)
    assert names(tmp_path) == ["step-000020"]


def test_what_a_killed_run_left_half_done_goes_or_gets_its_name_back(tmp_path: Path) -> None:
    for name in (".step-000030.partial", ".step-000010.old", "step-000020", ".step-000020.old"):
        make(tmp_path, name, content=name)
    tidy(tmp_path)
    assert names(tmp_path) == ["step-000010", "step-000020"]
    assert (tmp_path / "step-000010" / "file").read_text() == ".step-000010.old"
    assert (tmp_path / "step-000020" / "file").read_text() == "step-000020"


def test_files_are_dealt_out_evenly_to_the_ranks_that_check_them(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    folder.mkdir()
    sizes = [900, 500, 400, 300, 100, 50, 1]
    write_manifest(folder, {str(n): write_file(folder / str(n), b"x" * n) for n in sizes})
    for ranks in (1, 2, 3, 9):
        dealt = shares(folder, ranks)
        assert sorted(name for share in dealt for name in share) == sorted(read_manifest(folder))
        loads = [sum(map(int, share)) for share in dealt]
        least = max(sum(sizes) / ranks, max(sizes))
        assert max(loads) <= 4 / 3 * least, "largest first is within 4/3 of the best (Graham 1969)"


def test_killing_at_random_moments_loses_nothing_and_tears_nothing() -> None:
    """See tests/engine/checkpoint/kill.py; in a process of its own, which forks."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "tests.engine.checkpoint.kill", "--kills", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] == 50 and figures["moments"].get("writing", 0) >= 5, figures
