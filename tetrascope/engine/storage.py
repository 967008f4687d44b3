"""The output folder: writable, and the same one on every node."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from tetrascope.errors import UserError


def check_writable(folder: Path) -> None:
    """Makes the folder. Raises UserError when it cannot be made or written to."""
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output.dir: {folder} cannot be written ({error.strerror}); choose another folder") from error


def from_rank_0(value: str | None, folder: Path, device: torch.device) -> str | None:
    """Rank 0's value on every rank. Every rank must call it.

    What rank 0 found in a folder holds for all only if all see the same folder: a checkpoint whose parts lie on
    different machines is torn. Raises UserError on all ranks when one does not see what rank 0 writes to `folder`.
    """
    message: list[tuple[str, str | None] | None] = [None]
    marker = folder / f".shared-{uuid.uuid4().hex}"
    if dist.get_rank() == 0:
        marker.touch()
        message = [(marker.name, value)]
    dist.broadcast_object_list(message, src=0)
    name, agreed = message[0] or ("", None)
    seen = torch.tensor(float((folder / name).exists()), device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        marker.unlink()
    if not seen.item():
        raise UserError(f"output.dir: {folder} must be on storage that all nodes share; not every rank sees it")
    return agreed
