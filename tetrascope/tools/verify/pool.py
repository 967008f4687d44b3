"""A pool of processes that runs multi-rank jobs on this machine, one after another, without a new start each.

    def sum_of_ranks() -> float:                      # a module-level function: it is sent by name
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        return total.item()

    with WorkerPool(size=8) as pool:
        assert pool.run(sum_of_ranks, world=4) == [6.0] * 4

The processes are forked from a server that has imported torch once, so eight of them cost one import. Every
job gets a gloo process group of its own. A rank that raises, hangs or dies ends the job with a `RankFailure`
that says which rank, and where; see `WorkerPool.run`.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from tetrascope.engine.launch import keep_gloo_on_loopback
from tetrascope.tools.verify import worker as worker_module
from tetrascope.tools.verify.worker import LOOPBACK, READY, RELEASE, Job, Outcome, Task, listen, work

Result = TypeVar("Result")

GRACE_SECONDS = 2.0
"""How long the other ranks may go on after the first one has failed: long enough to fail in their turn."""

_START_SECONDS = 120.0  # the server's imports and the forks; generous, because a loaded machine is no failure
_LEAVE_SECONDS = 10.0  # to destroy a process group, once the job itself is over on all ranks
_STACK_SECONDS = 2.0  # for a hanging process to write its stack

# Imported by the server before it forks, so that a job does not pay for them on every rank. torch._dynamo
# because the first optimizer a process makes imports it.
_PRELOAD = (__name__, "torch._dynamo")
# The same, but only where this process has them already: then jobs most likely want them too.
_PRELOAD_IF_IMPORTED = (
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "pytest",
)


@dataclass(frozen=True)
class RankReport:
    """What became of one rank of a failed job.

    rank: the rank.
    kind: "raised", "unfinished" (still running when time was up), or "died" (the process ended).
    detail: the traceback, the Python stack of every thread, or how the process ended.
    exception: what the rank raised, where it could be sent over; else None.
    """

    rank: int
    kind: Literal["raised", "unfinished", "died"]
    detail: str
    exception: BaseException | None = None


class RankFailure(Exception):
    """A job did not succeed on all of its ranks.

    function: the dotted name of the job.
    world: its number of ranks.
    reports: one `RankReport` for each rank that did not succeed; deaths first, then failures in the order in
        which they happened, then the ranks that did not finish.
    """

    def __init__(self, function: str, world: int, reports: Sequence[RankReport]) -> None:
        self.function = function
        self.world = world
        self.reports = tuple(reports)
        ranks = ", ".join(str(rank) for rank in sorted({report.rank for report in reports}))
        lines = [f"{function} failed on rank {ranks} of a world of {world}"]
        lines += [f"\n--- rank {r.rank} of {world} {r.kind} ---\n{r.detail.rstrip()}" for r in reports]
        super().__init__("\n".join(lines))


class WorkerPool:
    """`size` processes that wait for jobs. They start at the first `run`, and anew after one that broke them.

    size: the largest world a job may have.
    timeout: seconds a job may take unless its `run` says otherwise.

    One job runs at a time; a pool is not to be shared between threads. What the workers print goes where this
    process printed when they were first started. Workers live on between jobs, so modules they imported stay
    imported; torch's random generator is seeded with 0 before each job, and the environment, the working
    directory and sys.path are set to the caller's.
    """

    def __init__(self, size: int = 8, timeout: float = 60.0) -> None:
        if size < 1:
            raise ValueError(f"a pool needs at least one process, got size={size}")
        self.size = size
        self.timeout = timeout
        self._workers: list[_Worker] = []
        self._store: dist.TCPStore | None = None
        self._job_number = 0
        self._closed = False
        # Registered after multiprocessing's own exit handler, so it runs before that one, which would wait
        # for the workers for ever.
        atexit.register(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. The pool cannot be used afterwards; closing it again does nothing."""
        self._closed = True
        self._stop()
        self._store = None
        atexit.unregister(self.close)

    def run(
        self, fn: Callable[..., Result], *args: Any, world: int, timeout: float | None = None, **kwargs: Any
    ) -> list[Result]:
        """Call fn(*args, **kwargs) on ranks 0 to world-1 and return what each returned, by rank.

        Each rank finds a default gloo process group of exactly `world` ranks, made for this job alone, and
        RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in its environment. fn goes over by name, so it must
        be a module-level function of a module other than `__main__`. Arguments and results are pickled:
        tensors are copied, never shared.

        timeout: seconds for this job; None for the pool's own.

        Raises ValueError if world does not fit the pool, TypeError if fn or an argument cannot be sent, and
        RankFailure if
        - a rank raises. The others get GRACE_SECONDS more; if all have ended by then, the pool lives on.
        - a rank is still running after `timeout` seconds: the report holds its Python stack, also where it
          hangs inside a collective.
        - a rank's process dies: at once, with its exit code or signal, and without the ranks that still run.
        A rank that hangs or dies costs the pool its processes: they are killed; the next run starts others.
        """
        if self._closed:
            raise RuntimeError("this WorkerPool is closed")
        if not 1 <= world <= self.size:
            raise ValueError(f"world={world} does not fit this pool: it must be from 1 to {self.size}")
        job = self._describe(fn, args, kwargs)
        limit = self.timeout if timeout is None else timeout
        try:
            self._ensure_started()
            outcomes, reports = self._execute(job, world, limit)
        except BaseException:
            self._stop()  # Ctrl-C included: the ranks are in the middle of a job
            raise
        if any(report.kind != "raised" for report in reports):
            self._stop()
        if reports:
            raise RankFailure(job.name, world, reports)
        return [pickle.loads(outcomes[rank].value) for rank in range(world)]

    def _describe(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job:
        module = getattr(fn, "__module__", None)
        name = f"{module}.{getattr(fn, '__qualname__', repr(fn))}"
        if module == "__main__":
            raise TypeError(f"{name}: the workers cannot import a script; move the function to a module")
        try:
            call = pickle.dumps((fn, args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{name} cannot be sent to the workers: a job is a module-level function and its arguments "
                f"can be pickled ({error})"
            ) from error
        self._job_number += 1
        return Job(
            number=self._job_number,
            name=name,
            module=module,
            module_file=getattr(sys.modules.get(module or ""), "__file__", None),
            call=call,
            sys_path=tuple(sys.path),
            directory=os.getcwd(),
            environment=_worker_environment(),
        )

    def _ensure_started(self) -> None:
        if self._workers and all(worker.process.is_alive() for worker in self._workers):
            return
        self._stop()  # one that was killed between two jobs takes the others with it
        if self._store is None:
            self._store = _listen_on_loopback()
        context = multiprocessing.get_context("forkserver")
        preload = [*_PRELOAD, *(name for name in _PRELOAD_IF_IMPORTED if name in sys.modules)]
        context.set_forkserver_preload(preload)
        with _main_module_hidden(), _one_openmp_thread():
            for _ in range(self.size):
                self._workers.append(_Worker(context, self._store.port))
        everyone = set(range(self.size))
        deadline = time.monotonic() + _START_SECONDS
        while everyone:
            ready = self._wait_for_any(everyone, deadline)
            if not ready or any(self._workers[rank].receive() != READY for rank in ready):
                raise RuntimeError("the processes of the WorkerPool did not start; their output says why")
            everyone -= set(ready)

    def _execute(self, job: Job, world: int, timeout: float) -> tuple[dict[int, Outcome], list[RankReport]]:
        """The outcome of each rank that came to one, and a report of each rank that did not succeed."""
        deadline = time.monotonic() + timeout
        for rank, process in enumerate(self._workers[:world]):
            process.send(Task(job, rank, world))
        outcomes: dict[int, Outcome] = {}
        died: list[RankReport] = []
        pending = set(range(world))
        patience = f"not done after {timeout:g} s"
        while pending and not died:
            ready = self._wait_for_any(pending, deadline)
            if not ready:
                break
            for rank in ready:
                outcome = self._workers[rank].receive()
                pending.discard(rank)
                if outcome is None:
                    died.append(self._report_death(rank))
                    continue
                outcomes[rank] = outcome
                if outcome.traceback and (end_of_grace := time.monotonic() + GRACE_SECONDS) < deadline:
                    deadline = end_of_grace
                    patience = f"not done {GRACE_SECONDS:g} s after the first failure"
        raised = sorted((o for o in outcomes.values() if o.traceback), key=lambda outcome: outcome.time)
        reports = died + [_raised(outcome) for outcome in raised]
        if died:
            return outcomes, reports
        if pending:
            return outcomes, reports + self._report_unfinished(pending, patience)
        return outcomes, reports + self._leave_groups(outcomes)

    def _leave_groups(self, outcomes: dict[int, Outcome]) -> list[RankReport]:
        """Have all ranks destroy their process groups, and report those that could not."""
        for rank, outcome in outcomes.items():
            if not outcome.traceback:
                self._workers[rank].send(RELEASE)
        pending = set(outcomes)
        deadline = time.monotonic() + _LEAVE_SECONDS
        while pending:
            ready = self._wait_for_any(pending, deadline)
            if not ready:
                patience = f"done, but not out of its process group after {_LEAVE_SECONDS:g} s"
                return self._report_unfinished(pending, patience)
            for rank in ready:
                if self._workers[rank].receive() is None:
                    return [self._report_death(rank)]
                pending.discard(rank)
        return []

    def _wait_for_any(self, ranks: Collection[int], deadline: float) -> list[int]:
        """The ranks that have sent something or died, in order; empty when the deadline has passed."""
        rank_of: dict[Any, int] = {}
        for rank in ranks:
            rank_of[self._workers[rank].connection] = rank
            rank_of[self._workers[rank].process.sentinel] = rank
        ready = multiprocessing.connection.wait(list(rank_of), max(0.0, deadline - time.monotonic()))
        return sorted({rank_of[item] for item in ready})

    def _report_death(self, rank: int) -> RankReport:
        return RankReport(rank, "died", self._workers[rank].describe_death())

    def _report_unfinished(self, ranks: Collection[int], patience: str) -> list[RankReport]:
        stuck = {rank: self._workers[rank] for rank in sorted(ranks)}
        for process in stuck.values():
            process.ask_for_stack()
        deadline = time.monotonic() + _STACK_SECONDS
        before: list[str] = []
        while (now := [process.stack() for process in stuck.values()]) != before or not all(now):
            if time.monotonic() > deadline:
                break
            before = now
            time.sleep(0.05)
        stacks = {rank: process.stack() or "(it did not answer)" for rank, process in stuck.items()}
        return [RankReport(rank, "unfinished", f"{patience}; it was here:\n{stacks[rank]}") for rank in stuck]

    def _stop(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()  # they own nothing that would need a farewell
        for worker in workers:
            worker.process.join()
            worker.discard()


_FRAMES_BELOW_JOB = re.compile(rf'\n  File "{re.escape(worker_module.__file__)}", line \d+ in perform\n.*', re.DOTALL)


class _Worker:
    """The pool's end of one process."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, store_port: int) -> None:
        self.connection, their_connection = context.Pipe()
        self._stacks, their_stacks = context.Pipe(duplex=False)
        self._stack_text = b""
        self.process = context.Process(target=work, args=(their_connection, their_stacks, store_port))
        self.process.start()
        their_connection.close()  # so that the end of the process is the end of the connection
        their_stacks.close()

    def send(self, message: Task | str) -> None:
        with contextlib.suppress(OSError):  # it is dead, which the next wait reports
            self.connection.send(message)

    def receive(self) -> Any:
        """The message that is waiting; None if there is none because the process is dead."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def ask_for_stack(self) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def stack(self) -> str:
        """What the process has written of its stacks, less what is the pool's own: the thread that listens,
        and the frames below the job."""
        while self._stacks.poll():
            part = os.read(self._stacks.fileno(), 1 << 16)
            if not part:  # it is dead, and this was all
                break
            self._stack_text += part
        text = self._stack_text.decode(errors="replace")
        threads = [thread for thread in text.split("\n\n") if f"in {listen.__name__}" not in thread]
        return "\n\n".join(_FRAMES_BELOW_JOB.sub("", thread) for thread in threads).strip()

    def describe_death(self) -> str:
        self.process.join(_LEAVE_SECONDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"killed by signal {-code} ({signal.Signals(-code).name})"
        else:
            how = f"exit code {code}"
        return f"the process ended: {how}\n{self.stack()}"

    def discard(self) -> None:
        self.connection.close()
        self._stacks.close()
        self.process.close()


def _raised(outcome: Outcome) -> RankReport:
    exception = None
    with contextlib.suppress(Exception):  # an exception class may refuse; its traceback is there as text
        exception = pickle.loads(outcome.value)
    return RankReport(outcome.rank, "raised", outcome.traceback, exception)


def _worker_environment() -> dict[str, str]:
    """This process's environment, one OpenMP thread, gloo on the loopback interface."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    keep_gloo_on_loopback(environment)
    return environment


def _listen_on_loopback() -> dist.TCPStore:
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=_START_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """multiprocessing runs the main script again in every process it starts, so that objects from it can be
    unpickled. Jobs are never in the main script, and running pytest or a command again is waste at best."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _one_openmp_thread() -> Iterator[None]:
    """For the fork server, which must not have started a thread pool when it forks."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
