"""Reading a checkpoint in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tetrascope.engine.build import StageModel
from tetrascope.engine.checkpoint.reader import CheckpointReader, damaged, saved_tensors
from tetrascope.engine.checkpoint.save import FORMAT, STATE_FILE
from tetrascope.engine.checkpoint.shards import ShardLoadPlanner, moment, state_shards
from tetrascope.engine.logical import Shard
from tetrascope.errors import UserError
from tetrascope.parallel.zero.optimizer import STATES, ZeroAdamW


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of state.json. Raises UserError when unreadable or of another format."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE_FILE}: cannot be read ({error}); give a checkpoint folder") from error
    if state.get("format") != FORMAT:
        raise UserError(f"{checkpoint}: checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def load_checkpoint(checkpoint: Path, model: StageModel, optimizer: ZeroAdamW) -> tuple[int, list[str]]:
    """Loads weights and optimizer state, saved in any layout; every rank calls it.

    Returns the steps taken, and the trained tensors of the whole model whose moments the checkpoint has not, since
    they were frozen: these start at zero. Raises UserError when the checkpoint is of another model or its files are
    damaged.
    """
    state = read_state(checkpoint)
    saved = saved_tensors(checkpoint)
    fresh = [name for name in sorted(model.trained_tensors()) if moment(STATES[0]) + name not in saved]
    absent = {moment(key) + name for key in STATES for name in fresh}
    shards = [shard for shard in state_shards(model, optimizer, owned_only=False) if shard.name not in absent]
    _check_shapes(checkpoint, shards, saved)
    try:
        load({}, storage_reader=CheckpointReader(checkpoint), planner=ShardLoadPlanner(shards))
    except CheckpointException as error:
        raise UserError(damaged(checkpoint, _first_cause(error))) from error
    step = int(state["step"])
    optimizer.set_step(0 if fresh else int(state.get("adam_steps", step)))
    for group in optimizer.groups:
        group.publish()
    return step, fresh


def _check_shapes(checkpoint: Path, shards: list[Shard], saved: dict[str, Any]) -> None:
    """Raises UserError unless the checkpoint holds the shards' tensors in their shapes."""
    for shard in shards:
        entry = saved.get(shard.name)
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shard.shape:
            found = f"shape {tuple(entry.size)}" if isinstance(entry, TensorStorageMetadata) else "nothing"
            raise UserError(
                f"{checkpoint}: expected {shard.name} with shape {shard.shape}, found {found}; "
                "it belongs to another model configuration"
            )


def _first_cause(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed; the exception itself holds every rank's traceback."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause!r}"
