"""Worker processes: the same results as without them, in order; deaths are made good once and then named.

The oracle is the job itself, done in this process. Deaths are real ones (SIGKILL), not exceptions.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.decode import jobs
from tetrascope.engine.data.decode.workers import DataWorkers
from tetrascope.engine.data.sources.base import BadSample
from tetrascope.errors import UserError


def pool(folder: Path, workers: int = 2, **options: Any) -> DataWorkers[Any, Any]:
    return DataWorkers(functools.partial(jobs.make, str(folder)), workers, **options)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a minute."""
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_whole(tmp_path: Path, workers: int) -> None:
    before = dict(os.environ)
    with pool(tmp_path, workers) as data:
        for tasks in (range(20), range(20, 23), []):
            found = list(data.map(tasks))
            assert [number for number, _ in found] == list(tasks)
            for number, rows in found:
                assert rows.dtype == np.float32 and np.array_equal(rows, np.full((3, number + 1), number))
        made = len(list(tmp_path.glob("made-*")))
        assert made == 1 if not workers else 1 <= made <= 2
        if workers:
            assert next(data.map(["threads"])) == ["1", "1", "1"]
        assert dict(os.environ) == before
        with pytest.raises(BadSample, match="HTML page") as caught:
            list(data.map([1, "bad", 2]))
        assert caught.value.kind == "wrong type"
        with pytest.raises(Exception, match="strange 1 2"):
            list(data.map(["strange"]))
        assert next(data.map([7]))[0] == 7  # no failure of a task harms the pool


def test_no_more_is_taken_than_the_bound_allows(tmp_path: Path) -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    with pool(tmp_path, 1, ahead=3) as data:
        results = data.map(tasks())
        for received in range(12):
            assert next(results)[0] == received
            assert len(taken) <= received + 3
    assert len(taken) == 12


def test_a_death_is_made_good_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pool(tmp_path, name=lambda task: f"sample {task}") as data:
        found = list(data.map([0, 1, "die once", 3, 4, 5, 6]))
        assert [one if isinstance(one, str) else one[0] for one in found] == [0, 1, "die once", 3, 4, 5, 6]
        assert "a data worker died" in caplog.text and "die once" in caplog.text
        with pytest.raises(UserError, match=r"data worker died twice .* while working on .*sample die"):
            list(data.map(["pid", "die", "pid"]))


def test_the_second_death_names_what_was_being_done_and_nothing_else(tmp_path: Path) -> None:
    # One worker, so exactly one task is being done; the others wait.
    with (
        pool(tmp_path, 1, name=lambda task: f"<{task}>", ahead=6) as data,
        pytest.raises(UserError, match=r"died twice .* while working on <die>; look"),
    ):
        list(data.map([0, 1, "die", 3, 4, 5]))
    assert len(list(tmp_path.glob("made-*"))) == 2


def test_an_error_in_making_is_told_as_it_is(tmp_path: Path) -> None:
    data: DataWorkers[Any, Any] = DataWorkers(functools.partial(jobs.broken_make, "here"), 1)
    with data, pytest.raises(ValueError, match="nothing can be made in here"):
        list(data.map([1]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_process_is_left_whatever_ends_the_run(tmp_path: Path, error: type[BaseException]) -> None:
    before = set(multiprocessing.active_children())
    pids: list[int] = []
    start = time.monotonic()
    with pytest.raises(error), pool(tmp_path, 2) as data:
        pids += data.map(["pid", "pid"])
        results = data.map(["pid", "hang", "hang", "hang"])
        next(results)
        assert wait((tmp_path / "hangs").exists)
        raise error
    assert time.monotonic() - start < 120, "waited for a task that hangs"
    assert pids and not any(alive(pid) for pid in pids)
    assert set(multiprocessing.active_children()) <= before


def test_an_interrupt_reaches_only_the_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pool(tmp_path, 1) as data:
        (pid,) = data.map(["pid"])
        os.kill(pid, signal.SIGINT)
        assert list(data.map(["pid"])) == [pid]
    assert not caplog.text


def test_closing_ends_a_thread_that_waits_and_starts_nothing(tmp_path: Path) -> None:
    data = pool(tmp_path, 1)
    ended: list[BaseException] = []

    def use() -> None:
        try:
            list(data.map(["hang", "hang", 1]))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    assert wait((tmp_path / "hangs").exists)
    before = set(multiprocessing.active_children())
    data.close()
    thread.join(30)
    assert len(ended) == 1 and not thread.is_alive()
    assert not set(multiprocessing.active_children()) - before
    assert len(list(tmp_path.glob("made-*"))) == 1
    data.close()


def test_workers_of_a_killed_run_end_too(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=jobs.orphan, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    pid = int((tmp_path / "pid").read_text())
    assert wait(lambda: not alive(pid))
