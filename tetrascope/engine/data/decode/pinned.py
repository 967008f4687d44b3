"""From ordinary memory to a GPU without making the CPU wait."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def pinned(batch: T, device: torch.device) -> T:
    """The batch (a dataclass of tensors and dataclasses, such as MicroBatch) on `device`.

    On a GPU every tensor is pinned and copied while the caller goes on (torch keeps the pinned memory until the copy
    is done); on the CPU the batch itself is returned.
    """
    if device.type != "cuda":
        return batch
    moved: T = _move(batch, device)
    return moved


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory().to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        moved = {name: _move(one, device) for name, one in fields.items()}
        changed = {name: one for name, one in moved.items() if one is not fields[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value
