"""What the processes of the tests of decoding do."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tetrascope.engine.data.decode.cache import DecodeCache, cache_key
from tetrascope.engine.data.decode.workers import DataWorkers
from tetrascope.engine.data.sources.base import BadSample


def make(folder: str) -> Callable[[Any], Any]:
    """Notes that it was called, and gives `work`."""
    (Path(folder) / f"made-{os.getpid()}").touch()
    return functools.partial(work, Path(folder))


def work(folder: Path, task: Any) -> Any:
    """Rows for a number; for words what they say."""
    if isinstance(task, int):
        return task, np.full((3, task + 1), task, np.float32)
    if task == "pid":
        return os.getpid()
    if task == "threads":
        return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    if task == "bad":
        raise BadSample("wrong type", "image a.jpg is an HTML page")
    if task == "strange":
        raise Strange(1, 2)
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "die once" and not (folder / "dead").exists():
        (folder / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hang":
        (folder / "hangs").touch()
        time.sleep(600)
    return task


class Strange(Exception):
    """Cannot be unpickled."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"strange {a} {b}")


def broken_make(folder: str) -> Callable[[Any], Any]:
    """Cannot be made."""
    raise ValueError(f"nothing can be made in {folder}")


def fill(folder: Path, size: int, first: int, processes: int) -> int:
    """Puts arrays of many sizes into a cache, with others, and looks at how large it gets; the most bytes seen."""
    cache, most = DecodeCache(folder, size), 0
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) < processes:
        time.sleep(0.001)
    for number in range(first, first + 80):
        side = 8 + number % 24
        pixels = np.full((1, side, side, 3), number % 251, np.uint8)
        cache.put(cache_key(number), pixels)
        found = cache.get(cache_key(number))
        if found is not None and not np.array_equal(found, pixels):
            raise ValueError(f"{number} came back as something else")
        most = max(most, published(folder))
    return most


def published(folder: Path) -> int:
    """Bytes of the finished files of a cache, while nobody may change it."""
    with open(folder / "total", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.glob("*/*.frames"))


def orphan(folder: str) -> None:
    """Starts workers, notes their ids, and is killed."""
    workers: DataWorkers[Any, Any] = DataWorkers(functools.partial(make, folder), 1)
    (pid,) = workers.map(["pid"])
    (Path(folder) / "pid.tmp").write_text(str(pid))
    (Path(folder) / "pid.tmp").rename(Path(folder) / "pid")
    os.kill(os.getpid(), signal.SIGKILL)
