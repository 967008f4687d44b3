"""Writing a checkpoint: shards of all ranks, state.json, the manifest, and then its name."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, save

import tetrascope
from tetrascope.engine.build import StageModel
from tetrascope.engine.checkpoint.files import FileRecord, ShardWriter, sync_folder, write_file
from tetrascope.engine.checkpoint.folders import beside, checkpoint_name
from tetrascope.engine.checkpoint.manifest import write_manifest
from tetrascope.engine.checkpoint.ranks import Ranks
from tetrascope.engine.checkpoint.shards import Copy, ShardSavePlanner, live, state_shards
from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.parallel.zero.optimizer import ZeroAdamW

FORMAT = 1
STATE_FILE = "state.json"

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with when the disk, the user's quota or the allowed size of a file is full."""


class DiskFull(UserError):
    """There was no room for a checkpoint. What had been written of it has been removed."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold of this rank. step: optimizer steps taken. state: JSON values for state.json.
    shards: gone through once, when they are written."""

    step: int
    shards: Iterable[Shard]
    state: dict[str, Any]


def take_snapshot(
    step: int, model: StageModel, optimizer: ZeroAdamW, description: dict[str, Any], copy: Copy = live
) -> Snapshot:
    """The state of a run after `step` steps; its tensors are the live ones unless `copy` makes others.

    description: JSON values kept beside the step (configuration, model, position in the data). Nothing of a learning
    rate schedule or a random generator is kept: the rate follows from the step, and what is random (order of samples,
    first weights) from the seed and a position.
    """
    versions = {"tetrascope": tetrascope.__version__, "torch": torch.__version__}
    state = {"format": FORMAT, "step": step, "adam_steps": optimizer.steps, "versions": versions, **description}
    return Snapshot(step, state_shards(model, optimizer, owned_only=True, copy=copy), state)


def write_snapshot(folder: Path, snapshot: Snapshot, ranks: Ranks) -> Path:
    """Writes `folder/step-NNNNNN`; every rank calls it. Returns its path, which exists only when all of it does.

    Raises DiskFull, or UserError for other failures of the file system, on all ranks alike; nothing is left of the
    checkpoint then.
    """
    final = folder / checkpoint_name(snapshot.step)
    partial = beside(final, "partial")
    try:
        ranks.first(lambda: _make_anew(partial))
        writer = ShardWriter(partial)
        planner = ShardSavePlanner(snapshot.shards)
        with _quiet() if ranks.group is None else nullcontext():
            save({}, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.group is None)
        records = {name: record for of_rank in ranks.gather(writer.records) for name, record in of_rank.items()}
        ranks.first(lambda: publish(partial, final, snapshot.state, records))
    except (CheckpointException, OSError) as error:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise explained(error, f"{final}: not saved") from error
    return final


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning that a process without a group saves alone. Filters are global: not for a thread in the background."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _make_anew(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path, state: Mapping[str, Any], records: Mapping[str, FileRecord]) -> None:
    """Makes a checkpoint of a folder of files that are on the disk: one process calls it.

    state: contents of state.json. records: of the files written so far, by name. The manifest comes last, then the
    folder gets its name; one of the same step gives way only then.
    """
    state_record = write_file(partial / STATE_FILE, json.dumps(state, indent=1).encode())
    write_manifest(partial, {**records, STATE_FILE: state_record})
    sync_folder(partial)
    old = beside(final, "old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def explained(error: BaseException, what: str) -> BaseException:
    """An error of the file system as one that the user can do something about; other errors as they are.

    what: was lost, for the message.
    """
    failures = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    causes = [cause for cause in failures if isinstance(cause, OSError)]
    if not causes:
        return error
    full = next((cause for cause in causes if cause.errno in NO_ROOM), None)
    if full is not None:
        remedy = "free some, or keep fewer checkpoints with checkpoint.keep_last"
        return DiskFull(f"{what}, there is no room ({full.strerror}); {remedy}; earlier checkpoints are untouched")
    return UserError(f"{what} ({causes[0]}); check the storage below output.dir")


def save_checkpoint(
    folder: Path, step: int, model: StageModel, optimizer: ZeroAdamW, description: dict[str, Any]
) -> Path:
    """Writes `folder/step-NNNNNN` while the caller waits; every rank calls it. See `write_snapshot`."""
    return write_snapshot(folder, take_snapshot(step, model, optimizer, description), Ranks.default())
