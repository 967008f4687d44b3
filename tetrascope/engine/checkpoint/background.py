"""Saving while the run goes on: a copy of this rank's shards in host memory, written by a thread.

torch.distributed.checkpoint.async_save is not used: it copies a state dict, whereas what is saved here are rectangles
of flat buffers, of which one copy a buffer will do; and it ends at the files, whereas a checkpoint's manifest, name
and deletion of older ones belong in the same thread. What it does well is done alike: one save at a time, buffers that
are kept for the next, a process group of its own for the thread's collectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.engine.build import StageModel
from tetrascope.engine.checkpoint.folders import prune
from tetrascope.engine.checkpoint.ranks import Ranks
from tetrascope.engine.checkpoint.save import DiskFull, Snapshot, explained, take_snapshot, write_snapshot
from tetrascope.engine.checkpoint.shards import state_shards
from tetrascope.engine.config import CheckpointSection
from tetrascope.errors import UserError
from tetrascope.parallel.zero.flat import FlatGroup, TrainedGroup
from tetrascope.parallel.zero.optimizer import ZeroAdamW


class Staging:
    """Host memory of the size of what this rank saves, 12 bytes a trained parameter of its share, kept between saves.

    Fresh memory would cost a page fault every 4 KiB at each save. Pinned for a GPU, whose copies then run at the
    speed of the bus. Frozen parameters never change and are saved from where they are.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, prefix: str, group: FlatGroup, flat: Tensor) -> Tensor:
        """Begins to copy a flat buffer; returns the copy, which is complete after `wait`."""
        if not isinstance(group, TrainedGroup):
            return flat
        buffer = self._buffers.get((prefix, id(group)))
        if buffer is None:
            buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
            self._buffers[prefix, id(group)] = buffer
        return buffer.copy_(flat.detach(), non_blocking=True)

    def wait(self) -> None:
        """Waits for the copies that were begun."""
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class Outcome:
    """What became of a save, the same on every rank but for the times, in seconds.

    checkpoint: its path, None when it failed. stalled: how long the run stood still, for the copy and for the save
    before. seconds: from then until it had its name.
    """

    step: int
    checkpoint: Path | None
    failure: UserError | None
    stalled: float
    seconds: float

    def report(self) -> str:
        """One line for the log."""
        if self.failure is not None:
            return f"warning: {self.failure}; the run goes on"
        return f"saved {self.checkpoint} in {self.seconds:.1f} s, the run stood still for {self.stalled:.2f} s"


class Saver:
    """Saves checkpoints of one run into a folder, as the options say. Every rank makes one, and calls it alike.

    after: called on rank 0 with each new checkpoint, in the thread that wrote it. What fails in the background is
    raised by `collect`, on all ranks. The default process group must exist; the saver makes one of its own.
    """

    def __init__(self, folder: Path, options: CheckpointSection, after: Callable[[Path], None] | None = None) -> None:
        self.folder, self.options, self._after = folder, options, after
        self._group = dist.new_group(backend="gloo")
        self.ranks = Ranks(self._group)
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Outcome] | None = None

    def prepare(self, model: StageModel, optimizer: ZeroAdamW) -> None:
        """Touches the memory that saves are copied to, so that the first one need not."""
        if self.options.asynchronous:
            state_shards(model, optimizer, owned_only=True, copy=self._staging.copy)

    def save(self, step: int, model: StageModel, optimizer: ZeroAdamW, description: dict[str, Any]) -> Outcome | None:
        """Begins to save; returns when the state is copied, or saved where saving is not asynchronous.

        Waits for the save before, and returns its outcome if nobody has collected it. Raises as `collect` does.
        """
        began = time.monotonic()
        before = self.collect()
        if self.options.asynchronous:
            snapshot = take_snapshot(step, model, optimizer, description, self._staging.copy)
            self._staging.wait()
            stalled = time.monotonic() - began
            self._pending = self._thread.submit(self._write, snapshot, stalled)
        else:
            self._pending = Future()
            self._pending.set_result(self._write(take_snapshot(step, model, optimizer, description), None))
        return before

    def _write(self, snapshot: Snapshot, stalled: float | None) -> Outcome:
        """stalled: how long the run stood still for the copy, None when it does until the end."""
        began = time.monotonic()
        path, failure = None, None
        try:
            path = write_snapshot(self.folder, snapshot, self.ranks)
            self._finish(snapshot.step, path)
        except UserError as error:
            failure = error
        seconds = time.monotonic() - began
        return Outcome(snapshot.step, path, failure, seconds if stalled is None else stalled, seconds)

    def _finish(self, step: int, checkpoint: Path) -> None:
        """What rank 0 does when a checkpoint has its name."""
        keep_last, after = self.options.keep_last, self._after
        try:
            if keep_last is not None:
                self.ranks.first(lambda: prune(self.folder, step, keep_last, self.options.keep_every))
            if after is not None:
                self.ranks.first(lambda: after(checkpoint))
        except OSError as error:
            raise explained(error, f"{checkpoint} is saved, but not what is made of it") from error

    @property
    def busy(self) -> bool:
        """Whether a save goes on in the background."""
        return self._pending is not None and not self._pending.done()

    def collect(self, last: bool = False) -> Outcome | None:
        """Waits for the save that was begun; its outcome, None when there is none. All ranks call it after one step.

        Raises what the save failed with, except that a full disk is only part of the outcome when
        `checkpoint.on_full_disk` is continue and the save is not the `last` one of the run.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        outcome = pending.result()
        goes_on = isinstance(outcome.failure, DiskFull) and self.options.on_full_disk == "continue" and not last
        if outcome.failure is not None and not goes_on:
            raise outcome.failure
        return outcome

    def close(self) -> None:
        """Waits for what is being written, whatever becomes of it, and leaves the process group."""
        self._thread.shutdown(wait=True)
        dist.destroy_process_group(self._group)
