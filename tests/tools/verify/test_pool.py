"""The worker pool: what a job sees, and that every way in which a rank can fail is told, soon and by name.

The jobs are functions of this module, as they are in any other test module that uses the pool.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tetrascope
from tetrascope.errors import UserError
from tetrascope.tools.verify.pool import RankFailure, WorkerPool


def sum_of_squared_ranks() -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() ** 2))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def describe_surroundings() -> tuple[list[str | None], tuple[int, int], str, int]:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "POOL_TEST"]
    place = (dist.get_rank(), dist.get_world_size())
    return [os.environ.get(name) for name in names], place, os.getcwd(), torch.get_num_threads()


def sum_over_mesh_axes(rows: int, columns: int) -> tuple[float, float]:
    """Leaves a mesh, its groups and a key in the store behind, and finds none of an earlier job."""
    store = dist.distributed_c10d._get_default_store()
    if store.check(["left behind"]):
        raise RuntimeError("the store holds a key of an earlier job")
    dist.barrier()
    store.set("left behind", "here")
    mesh = init_device_mesh("cpu", (rows, columns), mesh_dim_names=("row", "column"))
    sums = [torch.tensor(float(dist.get_rank())) for _ in mesh.mesh_dim_names or ()]
    dist.all_reduce(sums[0], group=mesh.get_group("row"))
    dist.all_reduce(sums[1], group=mesh.get_group("column"))
    return sums[0].item(), sums[1].item()


def double_in_place(tensor: torch.Tensor) -> dict[str, Any]:
    tensor.mul_(2)
    parameter = torch.nn.Parameter(torch.ones(3))
    return {"doubled": tensor, "transposed": tensor.T, "not a leaf": parameter * 2, "half": tensor.bfloat16()}


def draw() -> float:
    return torch.rand(()).item()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("the figure is not a number")
    dist.all_reduce(torch.zeros(1))


def refuse_layout() -> None:
    raise UserError(f"parallel.tp: does not divide the heads (rank {dist.get_rank()})")


def raise_or_sleep() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the others sleep on")
    time.sleep(600)


def oversleep_all_reduce(sleeper: int) -> None:
    if dist.get_rank() == sleeper:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))


def return_early_from_barrier() -> None:
    if dist.get_rank() != 0:
        dist.barrier()


def end_process(rank: int, number: signal.Signals | None) -> None:
    if dist.get_rank() == rank:
        if number is None:
            os._exit(7)
        os.kill(os.getpid(), number)
    time.sleep(600)


def return_lambda() -> object:
    return lambda: None


def nothing() -> None:
    pass


def pids(pool: WorkerPool) -> list[int]:
    return pool.run(os.getpid, world=pool.size)


def fates(failure: RankFailure) -> list[tuple[int, str]]:
    """Rank and kind of each report: by rank after the first, where the order of the rest is chance."""
    first, *rest = [(report.rank, report.kind) for report in failure.reports]
    return [first, *sorted(rest)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_rank_takes_part_and_results_come_by_rank(pool: WorkerPool, world: int) -> None:
    expected = float(sum(rank**2 for rank in range(world)))
    assert pool.run(sum_of_squared_ranks, world=world) == [(rank, expected) for rank in range(world)]


def test_ranks_see_their_place_and_the_callers_surroundings(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.run(nothing, world=3)  # they start elsewhere
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POOL_TEST", "set by the caller")
    for rank, seen in enumerate(pool.run(describe_surroundings, world=3)):
        environment = [str(rank), str(rank), "3", "3", "set by the caller"]
        assert seen == (environment, (rank, 3), str(tmp_path), 1)
    monkeypatch.delenv("POOL_TEST")
    assert pool.run(describe_surroundings, world=1)[0][0] == ["0", "0", "1", "1", None]


def test_each_job_has_groups_of_its_own(pool: WorkerPool) -> None:
    # The same processes in other shapes, and the first shape once more: group names repeat from job to job.
    before = pids(pool)
    for rows, columns in [(2, 4), (4, 2), (2, 2), (2, 4)]:
        grid = torch.arange(float(rows * columns)).view(rows, columns)
        down, across = grid.sum(0).expand(rows, columns), grid.sum(1, keepdim=True).expand(rows, columns)
        expected = list(zip(down.flatten().tolist(), across.flatten().tolist(), strict=True))
        assert pool.run(sum_over_mesh_axes, rows, columns, world=rows * columns) == expected
    assert pids(pool) == before


def test_tensors_are_copied_both_ways(pool: WorkerPool) -> None:
    sent = torch.arange(6.0).view(2, 3).T
    for result in pool.run(double_in_place, tensor=sent, world=2):
        torch.testing.assert_close(result["doubled"], sent * 2)
        torch.testing.assert_close(result["transposed"], sent.T * 2)
        torch.testing.assert_close(result["not a leaf"].detach(), torch.full((3,), 2.0))
        assert result["half"].dtype == torch.bfloat16
        assert not result["doubled"].is_shared()
    torch.testing.assert_close(sent, torch.arange(6.0).view(2, 3).T)


def test_random_numbers_do_not_depend_on_earlier_jobs(pool: WorkerPool) -> None:
    assert len({*pool.run(draw, world=2), *pool.run(draw, world=2)}) == 1


def test_a_module_that_is_not_on_the_path_is_loaded_from_its_file(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As pytest's importlib mode does it: the package exists in sys.modules only.
    file = tmp_path / "jobs.py"
    file.write_text("class Answer(int):\n    pass\n\n\ndef answer() -> Answer:\n    return Answer(42)\n")
    spec = importlib.util.spec_from_file_location("pool_test_folder.jobs", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pool_test_folder", types.ModuleType("pool_test_folder"))
    monkeypatch.setitem(sys.modules, "pool_test_folder.jobs", module)
    spec.loader.exec_module(module)
    answers = pool.run(module.answer, world=2)
    assert answers == [42, 42]
    assert isinstance(answers[0], module.Answer)


def test_a_warm_pool_runs_a_trivial_job_in_less_than_a_second(pool: WorkerPool) -> None:
    pool.run(nothing, world=8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        pool.run(nothing, world=8)
        seconds.append(time.perf_counter() - start)
    print("a trivial job on 8 ranks:", ", ".join(f"{s * 1e3:.0f} ms" for s in seconds))
    assert min(seconds) < 1.0


def test_a_rank_that_raises_is_reported_first_with_its_traceback(pool: WorkerPool) -> None:
    before = pids(pool)
    with pytest.raises(RankFailure) as caught:
        pool.run(raise_on, 2, world=4)
    failure, message = caught.value, str(caught.value)
    assert (failure.function, failure.world) == (f"{__name__}.raise_on", 4)
    assert failure.reports[0].rank == 2
    assert fates(failure)[1:] == [(rank, "raised") for rank in (0, 1, 3)]  # their collective was broken off
    assert isinstance(failure.reports[0].exception, ValueError)
    assert f"{__name__}.raise_on failed on rank 0, 1, 2, 3 of a world of 4" in message
    assert message.index("--- rank 2 of 4 raised ---") < message.index("--- rank 0 of 4 raised ---")
    assert 'raise ValueError("the figure is not a number")' in message
    assert 'test_pool.py", line' in message
    assert pids(pool) == before
    assert pool.run(sum_of_squared_ranks, world=4)[0] == (0, 14.0)


def test_a_failure_of_all_ranks_keeps_the_processes(pool: WorkerPool) -> None:
    before = pids(pool)
    with pytest.raises(RankFailure) as caught:
        pool.run(refuse_layout, world=8)
    assert sorted(report.rank for report in caught.value.reports) == list(range(8))
    assert all(isinstance(report.exception, UserError) for report in caught.value.reports)
    assert pids(pool) == before


def test_ranks_that_go_on_after_a_failure_get_a_short_grace(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetrascope.tools.verify.pool.GRACE_SECONDS", 0.5)
    before = pids(pool)
    start = time.perf_counter()
    with pytest.raises(RankFailure) as caught:
        pool.run(raise_or_sleep, world=3)
    seconds = time.perf_counter() - start
    assert 0.5 <= seconds < 10.0
    assert fates(caught.value) == [(1, "raised"), (0, "unfinished"), (2, "unfinished")]
    assert "the others sleep on" in str(caught.value)
    assert "not done 0.5 s after the first failure" in caught.value.reports[1].detail
    assert not set(pids(pool)) & set(before)


def test_a_hanging_rank_is_reported_with_its_stack(pool: WorkerPool) -> None:
    before = pids(pool)
    start = time.perf_counter()
    with pytest.raises(RankFailure) as caught:
        pool.run(oversleep_all_reduce, 1, world=3, timeout=1.0)
    assert 1.0 <= time.perf_counter() - start < 10.0
    assert fates(caught.value) == [(0, "unfinished"), (1, "unfinished"), (2, "unfinished")]
    for report in caught.value.reports:
        assert "not done after 1 s" in report.detail
        assert " in oversleep_all_reduce" in report.detail
        assert "in _listen" not in report.detail
        assert "multiprocessing" not in report.detail
        # Ranks 0 and 2 hang inside a C++ collective and are seen there all the same.
        assert (" in all_reduce" in report.detail) == (report.rank != 1)
    assert not set(pids(pool)) & set(before)
    assert pool.run(sum_of_squared_ranks, world=8)[7] == (7, 140.0)


def test_a_rank_that_returns_stays_in_its_group_for_the_others(pool: WorkerPool) -> None:
    # If rank 0 left its group when done, the barrier would be broken off, and the cause, that one rank
    # skipped it, would look like a lost connection.
    with pytest.raises(RankFailure) as caught:
        pool.run(return_early_from_barrier, world=3, timeout=0.5)
    assert fates(caught.value) == [(1, "unfinished"), (2, "unfinished")]


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (None, "exit code 7"),
        (signal.SIGKILL, "killed by signal 9 (SIGKILL)"),
        (signal.SIGSEGV, "killed by signal 11 (SIGSEGV)"),
    ],
)
def test_a_dying_rank_is_reported_at_once(pool: WorkerPool, number: signal.Signals | None, how: str) -> None:
    before = pids(pool)
    start = time.perf_counter()
    with pytest.raises(RankFailure) as caught:
        pool.run(end_process, 1, number, world=2)
    assert time.perf_counter() - start < 10.0  # not the pool's 60: the machine may be busy
    assert fates(caught.value) == [(1, "died")]
    assert how in str(caught.value)
    # A segmentation fault can still say where it happened.
    assert (" in end_process" in str(caught.value)) == (number == signal.SIGSEGV)
    assert not set(pids(pool)) & set(before)


def test_a_process_killed_between_jobs_is_replaced(pool: WorkerPool) -> None:
    victim = pool._workers[3].process
    before = pids(pool)
    victim.kill()
    victim.join()
    assert pool.run(sum_of_squared_ranks, world=8)[0] == (0, 140.0)
    assert not set(pids(pool)) & set(before)


def test_a_result_that_cannot_be_sent_is_a_failure(pool: WorkerPool) -> None:
    with pytest.raises(RankFailure, match=r"(?s)return_lambda failed on rank 0, 1 of a world of 2.*lambda"):
        pool.run(return_lambda, world=2)


def test_what_cannot_be_run_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="world=9 does not fit this pool: it must be from 1 to 8"):
        pool.run(nothing, world=9)
    with pytest.raises(ValueError, match="world=0"):
        pool.run(nothing, world=0)
    with pytest.raises(TypeError, match="a job is a module-level function"):
        pool.run(lambda: None, world=2)
    with pytest.raises(ValueError, match="at least one process"):
        WorkerPool(size=0)
    closed = WorkerPool(size=1)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.run(nothing, world=1)


# A script without `if __name__ == "__main__"`. Its standard output stays open as long as any process that
# inherited it lives: the script, the fork server and the workers.
SCRIPT = """
import sys
from tetrascope.tools.verify import pool as pool_module
print("script runs", flush=True)
def local(): pass
pool_module._PRELOAD = (pool_module.__name__,)  # all that these jobs need: a faster start
pool = pool_module.WorkerPool(size=2)
pool.run(print, "a rank prints\\n", end="", world=2)
try:
    pool.run(local, world=2)
except TypeError as error:
    print(error, flush=True)
if "hang" in sys.argv:
    pool.run(exec, '''
import time, torch, torch.distributed as dist
dist.barrier()
print("a rank hangs\\\\n", end="", flush=True)
time.sleep(600) if dist.get_rank() else dist.all_reduce(torch.ones(1))
''', {}, world=2)
"""


def test_no_process_outlives_the_pools_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = dict(os.environ, PYTHONPATH=str(Path(tetrascope.__file__).parents[1]))

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    with start() as ending, start("hang") as hanging:
        assert hanging.stdout is not None
        lines = [hanging.stdout.readline() for _ in range(6)]
        hanging.kill()
        # Each of these returns when the last holder of the standard output has ended.
        rest, _ = hanging.communicate(timeout=60)
        output, _ = ending.communicate(timeout=60)
    assert lines[:3] == ["script runs\n", "a rank prints\n", "a rank prints\n"]
    assert lines[3] == "__main__.local: the workers cannot import a script; move the function to a module\n"
    assert lines[4:] == ["a rank hangs\n"] * 2
    assert (rest, hanging.returncode) == ("", -signal.SIGKILL)
    assert (output, ending.returncode) == ("".join(lines[:4]), 0)
