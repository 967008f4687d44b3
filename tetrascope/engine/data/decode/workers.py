"""Worker processes that prepare samples, so that decoding uses more cores than one.

The pool knows nothing of samples: `make` gives, once in each worker, the function that does a task. A worker that
dies (killed for memory, crashed in a decoder) costs one restart: all workers are started anew and what was lost is
done again. The second death ends the run and names what was being done.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Generic, TypeVar

from tetrascope.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
DEATHS = 2
"""The death of a worker that is not made good any more."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""For the workers: they are as many as there are cores to use. Libraries read it when they are loaded."""
log = logging.getLogger(__name__)


class DataWorkers(Generic[Task, Result]):
    """A pool of `workers` processes that do tasks, in order; 0 does them in the calling thread.

    make: picklable, called once in each worker. name: what to call a task in messages. ahead: tasks handed out and not
    yet taken, by default two for each worker; it bounds the memory for results. Use it as a context, or call `close`;
    processes also end when this one is killed. One thread at a time may use a pool.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Task], Result]],
        workers: int,
        name: Callable[[Task], str] = str,
        ahead: int | None = None,
    ) -> None:
        self._make, self._name, self._count = make, name, workers
        self._ahead = ahead or 2 * max(workers, 1)
        self._numbers = itertools.count()
        self._deaths = 0
        self._closed = False
        self._lock = threading.Lock()
        self._here: Callable[[Task], Result] | None = None
        self._crew = _Crew(make, workers) if workers else None

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks.

        An exception of a task is raised in its place and ends the iteration; tasks whose failure must not stop the
        others return it. Raises UserError when a worker died for the second time.
        """
        if self._crew is None:
            self._here = self._here or self._make()
            yield from map(self._here, tasks)
            return
        left = zip(self._numbers, tasks, strict=False)
        out: deque[tuple[int, Task, Future[bytes]]] = deque()
        try:
            while True:
                for number, task in itertools.islice(left, self._ahead - len(out)):
                    out.append((number, task, self._crew.submit(number, task)))
                if not out:
                    return
                try:
                    data = out[0][2].result()
                except BrokenProcessPool:
                    crew = self._replaced([(number, task) for number, task, _ in out])
                    out = deque((n, t, f if _succeeded(f) else crew.submit(n, t)) for n, t, f in out)
                    continue
                out.popleft()
                yield pickle.loads(data)
        finally:
            for _, _, future in out:
                future.cancel()

    def close(self) -> None:
        """Ends the processes, whatever they are doing. May be called from any thread, and again."""
        with self._lock:
            self._closed = True
            if self._crew is not None:
                self._crew.close()

    def __enter__(self) -> DataWorkers[Task, Result]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _replaced(self, waiting: list[tuple[int, Task]]) -> _Crew:
        """New processes for those that died. waiting: what was handed out."""
        with self._lock:
            if self._closed or self._crew is None:
                raise CancelledError("the data workers were closed")
            self._deaths += 1
            busy = self._crew.busy()
            at_work = [task for number, task in waiting if number in busy] or [task for _, task in waiting]
            names = ", ".join(self._name(task) for task in at_work)
            self._crew.close()
            if self._deaths >= DEATHS:
                raise UserError(
                    "data worker died twice (killed for lack of memory, or crashed in a decoder), the second time "
                    f"while working on {names}; look at the system log, lower data.workers, or remove the sample"
                )
            log.warning("a data worker died while working on %s; the workers are started once more", names)
            self._crew = _Crew(self._make, self._count)
            return self._crew


class _Crew:
    """The processes until one of them dies. notes: for each worker the number of its task, -1 for none."""

    def __init__(self, make: Callable[[], Any], workers: int) -> None:
        self._context = _Context()
        self._notes = self._context.RawArray("q", [-1] * workers)
        arguments = (pickle.dumps(make), self._notes, self._context.Value("q", 0))
        self._executor = ProcessPoolExecutor(workers, self._context, _start, arguments)

    def submit(self, number: int, task: Any) -> Future[bytes]:
        try:
            return self._executor.submit(_work, number, pickle.dumps(task))
        except (BrokenProcessPool, OSError) as error:
            # A worker died since the last result: found out when this one is due. An OSError where the executor's
            # thread has closed its pipes over it, but has not yet said so.
            failed: Future[bytes] = Future()
            failed.set_exception(BrokenProcessPool(str(error)))
            return failed

    def busy(self) -> set[int]:
        """Numbers of the tasks that are, or were when the workers died, being done."""
        return {number for number in self._notes if number >= 0}

    def close(self) -> None:
        processes = [process for process in self._context.started if process.pid is not None]
        for process in processes:
            process.kill()
        # Only now: a shutdown that does not wait forgets the executor's thread, and then that thread and this one would
        # both wait for the same processes, of which one learns nothing.
        self._executor.shutdown(wait=True, cancel_futures=True)
        for process in processes:
            process.join()


class _Process(SpawnProcess):
    def start(self) -> None:
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(ONE_THREAD)
        try:
            super().start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


class _Context(SpawnContext):
    """Starts fresh processes (a fork would copy the locks of torch's and gloo's threads), and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[_Process] = []

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]
        process = _Process(*args, **kwargs)
        self.started.append(process)
        return process


def _succeeded(future: Future[bytes]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


# --- in the worker

_make = b""
_function: Callable[[Any], Any] | None = None
_notes: Any = None
_place = 0


def _start(make: bytes, notes: Any, taken: Any) -> None:
    global _make, _notes, _place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the pool's owner ends the workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with taken.get_lock():
        _place = taken.value
        taken.value += 1
    _make, _notes = make, notes


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, task: bytes) -> bytes:
    global _function
    _notes[_place] = number
    try:
        if _function is None:
            _function = pickle.loads(_make)()
        return pickle.dumps(_function(pickle.loads(task)), protocol=5)
    except Exception as error:
        raise _portable(error) from None
    finally:
        _notes[_place] = -1


def _portable(error: Exception) -> Exception:
    """The error, or its text where the other process could not unpickle it, which would look like a death."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(type(error), error, error.__traceback__)))
