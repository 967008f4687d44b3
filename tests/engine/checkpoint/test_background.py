"""Saving while the run goes on, a disk that is full for a while, and what a run finds when it comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tetrascope
from tests.engine.checkpoint.save_jobs import (
    find,
    interrupted_run,
    last_save_without_room,
    resume_and_say,
    run_to_the_end,
    save_in_layout,
    save_to_a_full_disk,
    save_while_the_state_changes,
)
from tests.engine.train_jobs import run_steps
from tests.tiny import write_config
from tetrascope.engine.config_file import load_config
from tetrascope.errors import UserError
from tetrascope.tools.verify.pool import RankFailure, WorkerPool


def test_what_is_saved_is_the_state_when_the_save_began(pool: WorkerPool, tmp_path: Path) -> None:
    """The thread is held up until the state has changed: without a copy of its own it would write the later one.

    Frozen weights keep the first number.
    """
    for name, first, second, stalled in pool.run(save_while_the_state_changes, tmp_path, world=2):
        assert (name, first, second) == ("step-000001", {1.0}, {1.0, 2.0})
        assert stalled < 60


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_a_full_disk_stops_the_run_or_not_as_configured(
    pool: WorkerPool, tmp_path: Path, on_full_disk: str, asynchronous: bool
) -> None:
    """One rank of two finds no room: both hear of it, nothing is left of that save, and the next one is whole."""
    for first, second, third, left in pool.run(save_to_a_full_disk, tmp_path, on_full_disk, asynchronous, world=2):
        assert first.startswith(f"saved {tmp_path / 'step-000001'} in")
        reason = f"{tmp_path / 'step-000002'}: not saved, there is no room (No space left on device); free some"
        if on_full_disk == "stop":
            assert second.startswith(f"raised DiskFull: {reason}")
        else:
            assert second.startswith(f"warning: {reason}") and second.endswith("; the run goes on")
        assert third.startswith(f"saved {tmp_path / 'step-000003'} in")
        assert left == "step-000001 step-000003"
    assert set(pool.run(find, tmp_path, world=2)) == {("step-000003", ())}


def test_the_last_save_of_a_run_must_succeed(pool: WorkerPool, tmp_path: Path) -> None:
    assert "step-000001: not saved, there is no room" in pool.run(last_save_without_room, tmp_path, world=1)[0]


def test_a_flipped_byte_is_found_by_the_ranks_together(pool: WorkerPool, tmp_path: Path) -> None:
    """Wherever it lies, whichever rank reads that file; all ranks pass over the same checkpoint."""
    pool.run(save_in_layout, tmp_path, {"dp": None}, world=3)
    newest = tmp_path / "step-000007"
    for path in newest.glob("*.distcp"):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 128]) + content[middle + 1 :])
        found = pool.run(find, tmp_path, world=3)
        assert found == [found[0]] * 3
        name, (reason,) = found[0]
        assert name is None and reason.startswith(f"step-000007 ({path.name} has checksum ")
        path.write_bytes(content)
    assert pool.run(find, tmp_path, world=3) == [("step-000007", ())] * 3


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, train={"save_every": 1})


def test_a_run_keeps_what_it_is_told_to_and_says_what_it_made(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    options = ["checkpoint.keep_last=2", "checkpoint.keep_every=3", "parallel.dp=2"]
    of_ranks = pool.run(run_to_the_end, config, options, False, False, world=2)
    assert [steps for steps, _ in of_ranks] == [[3, 5, 6]] * 2
    assert of_ranks[0][1] == [f"{step} checkpoint" for step in range(1, 7)], "by rank 0, in the thread that saved"
    assert of_ranks[1][1] == []
    log = (tmp_path / "run" / "checkpoints" / "step-000006" / "state.json").read_text()
    versions = json.loads(log)["versions"]
    assert versions == {"tetrascope": tetrascope.__version__, "torch": torch.__version__}


def test_an_interrupted_run_ends_with_a_whole_checkpoint(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """The save is in the background, but the run does not end before it."""
    options = ["train.save_every=100", "parallel.dp=2"]
    assert pool.run(interrupted_run, config, options, world=2) == [(True, "step-000002", [2])] * 2
    assert pool.run(find, tmp_path / "run" / "checkpoints", world=1) == [("step-000002", ())]


def test_a_run_whose_disk_is_full_stops_or_ends_without_its_last_checkpoint(
    pool: WorkerPool, config: Path, tmp_path: Path
) -> None:
    for choice in ("stop", "continue"):
        out = tmp_path / choice
        options = [f"checkpoint.on_full_disk={choice}", f"output.dir={out}", "parallel.pp=2"]
        with pytest.raises(RankFailure, match=r"DiskFull: .*step-00000\d: not saved, there is no room") as failure:
            pool.run(run_to_the_end, config, options, False, True, world=2)
        assert all(f"rank {rank} of 2 raised" in str(failure.value) for rank in range(2)), "both, not one that waits"
        assert ("step-000006: not saved" in str(failure.value)) == (choice == "continue")
        assert list((out / "checkpoints").iterdir()) == []


def test_resume_passes_over_what_is_damaged_and_says_why(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """And trains from the older one to the same numbers, and saves again where the damaged one lay."""
    out = tmp_path / "run"
    layout = ["parallel.dp=2", f"output.dir={out}"]
    for steps in (2, 4):
        whole = pool.run(run_steps, config, layout, steps, steps > 2, world=2)[0]
    file = max((out / "checkpoints" / "step-000004").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    line = pool.run(resume_and_say, config, layout, world=2)[0]
    assert (
        f"going on from {out / 'checkpoints' / 'step-000002'}, step 2; passed over step-000004 ({file.name} has" in line
    )
    again = pool.run(run_steps, config, layout, 4, True, world=2)[0]
    assert [s["loss"] for s in again] == [s["loss"] for s in whole]
    assert pool.run(find, out / "checkpoints", world=1) == [("step-000004", ())]
    for path in (out / "checkpoints").glob("step-*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(
        RankFailure, match=r"no checkpoint is whole: step-000004 \(manifest.json cannot.* copy one again"
    ):
        pool.run(resume_and_say, config, layout, world=2)


def test_options_that_contradict_each_other(config: Path) -> None:
    with pytest.raises(
        UserError, match="keep_every means nothing without keep_last, since all are kept; add keep_last"
    ):
        load_config(config, ["checkpoint.keep_every=5"])
    with pytest.raises(UserError, match=r"unknown key 'checkpoint.keeplast'; did you mean 'checkpoint.keep_last'\?"):
        load_config(config, ["checkpoint.keeplast=5"])
