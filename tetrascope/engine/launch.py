"""Starts the ranks of a run on this machine, with torch's elastic launcher, when nobody else has."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tetrascope.engine.config import Config

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended, as shells use it."""

ERRORS = "TETRASCOPE_ERROR_DIR"
"""Environment variable: where the ranks leave their messages for the process that started them."""

SAVE_SECONDS = 600
"""How long the ranks may take to end their step and save after Ctrl-C."""


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_from_environment() -> int | None:
    """Number of ranks that a launcher started; None when there is no launcher."""
    return int(os.environ["WORLD_SIZE"]) if launched() else None


def report(message: str) -> None:
    """Shows an error to the user once.

    The ranks of `launch` leave it to the process that started them, which shows the first; a rank of another launcher
    says which rank it is.
    """
    rank = os.environ.get("RANK")
    folder = os.environ.get(ERRORS)
    if rank is not None and folder:
        (Path(folder) / f"rank-{rank}").write_text(message)
        return
    print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)


def launch(arguments: list[str], ranks: int, config: Config) -> int:
    """Runs `python -m tetrascope ARGUMENTS` as `ranks` ranks; returns the exit code.

    A rank that fails has reported why; the launcher's own report would only bury that.
    """
    os.environ["OMP_NUM_THREADS"] = str(config.train.threads)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as errors:
        os.environ[ERRORS] = errors
        try:
            elastic_launch(_local(ranks), sys.executable)("-m", "tetrascope", *arguments)
        except SignalException:
            return INTERRUPTED
        except ChildFailedError as error:
            messages = sorted(Path(errors).iterdir(), key=lambda path: path.stat().st_mtime_ns)
            if messages:
                print(f"error: {messages[0].read_text()}", file=sys.stderr)
            code: int = error.get_first_failure()[1].exitcode
            return code if code > 0 else 1
        finally:
            del os.environ[ERRORS]
    return 0


def _local(ranks: int) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SAVE_SECONDS,
    )
