"""Starts the ranks of a run on this machine, with torch's elastic launcher, when nobody else has."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import uuid
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tetrascope.engine.config import Config

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended, as shells use it."""

ERRORS = "TETRASCOPE_ERROR_DIR"
"""Environment variable: where the ranks leave their messages for the process that started them."""

SAVE_SECONDS = 600
"""How long the ranks may take to end their step and save after Ctrl-C (torch 2.11 allows no choice: 30 s there)."""

LOOPBACK = "127.0.0.1"


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
    """Runs `python -m tetrascope ARGUMENTS` as `ranks` ranks; returns the exit code, 2 for bad input.

    A rank that fails has reported why, and one that was killed is named here; the launcher's own report would only
    bury that.
    """
    keep_gloo_on_loopback(os.environ)
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
            if messages:  # others may have failed after it, at connections that it closed
                print(f"error: {messages[0].read_text()}", file=sys.stderr)
                return 2
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                print(f"error: rank {rank} was ended by signal {-failure.exitcode} (out of memory?)", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 1
        finally:
            del os.environ[ERRORS]
    return 0


def keep_gloo_on_loopback(environment: MutableMapping[str, str]) -> None:
    """For ranks on one machine: its host name may not resolve, and a firewall may stand before other interfaces."""
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())


def _local(ranks: int) -> LaunchConfig:
    options: dict[str, Any] = {}
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        options["shutdown_timeout"] = SAVE_SECONDS
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        local_addr=LOOPBACK,
        max_restarts=0,
        monitor_interval=0.1,
        **options,
    )
