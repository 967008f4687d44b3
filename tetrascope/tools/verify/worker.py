"""The worker's side of the pool: what the two sides send each other, and a worker's life."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

READY = "ready"  # worker to pool: waiting for a task
RELEASE = "release"  # pool to worker: every rank is through the job, the process group may go
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Job:
    """One `run`, as all of its ranks see it. `call` is the pickled (fn, args, kwargs)."""

    number: int
    name: str
    module: str | None
    module_file: str | None
    call: bytes
    sys_path: tuple[str, ...]
    directory: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Task:
    """One rank's part in a job."""

    job: Job
    rank: int
    world: int


@dataclass(frozen=True)
class Outcome:
    """How a rank's task ended.

    time: seconds of the monotonic clock, which all processes share.
    value: the pickled result; with a traceback, the pickled exception, empty if that cannot be pickled.
    """

    rank: int
    time: float
    value: bytes
    traceback: str = ""


def work(connection: Any, stacks: Any, store_port: int) -> None:
    """A worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool's process, which kills this one
    # These write from the signal handler itself, so they do even where no Python code gets to run.
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    torch.set_num_threads(1)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, inbox), daemon=True).start()
    store = dist.TCPStore(LOOPBACK, store_port, is_master=False, wait_for_workers=False)
    connection.send(READY)
    while True:
        outcome = perform(inbox.get(), store)
        connection.send(outcome)
        # A rank that succeeded stays until all have: others may still be reading what it sent. One that
        # failed goes at once, which makes the others' collectives fail rather than hang.
        if not outcome.traceback:
            inbox.get()
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(READY)


def listen(connection: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Take in what the pool sends; end the process, whatever it is doing, when the pool's process is gone."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def perform(task: Task, store: dist.Store) -> Outcome:
    job = task.job
    try:
        rank, world = str(task.rank), str(task.world)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        _set_environment({**job.environment, **ranks})
        os.chdir(job.directory)
        sys.path[:] = job.sys_path
        torch.manual_seed(0)
        _import_module(job.module, job.module_file)
        fn, args, kwargs = pickle.loads(job.call)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"job{job.number}", store), rank=task.rank, world_size=task.world
        )
        value = pickle.dumps(fn(*args, **kwargs), protocol=pickle.HIGHEST_PROTOCOL)
        return Outcome(task.rank, time.monotonic(), value)
    except BaseException as error:
        failed_at = time.monotonic()
        return Outcome(task.rank, failed_at, _pickle_exception(error), traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _pickle_exception(error: BaseException) -> bytes:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        return pickled
    except Exception:
        return b""


def _set_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _import_module(name: str | None, file: str | None) -> None:
    """Import the job's module, by its file where its name cannot be imported: pytest's importlib mode names
    test modules after their place below the root directory, which need not be on sys.path."""
    if name is None or name in sys.modules:
        return
    importlib.invalidate_caches()  # the file may be newer than the last look at its folder
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if file is None or not (name == missing or name.startswith(missing + ".")):
            raise
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        parts = name.split(".")
        for end in range(1, len(parts)):  # pickle asks for the packages too
            package = ".".join(parts[:end])
            sys.modules.setdefault(package, types.ModuleType(package))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
