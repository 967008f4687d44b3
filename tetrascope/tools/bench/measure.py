"""Runs and times training steps on every rank, with the trainer as it is."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tetrascope.engine.trainer import StepStats, Trainer
from tetrascope.tools.bench.peak import peak_rates

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """Timed steps. `steps` and `seconds` are rank 0's clock; counts and FLOPs are those of the whole batch.

    data_wait: seconds of each step that the rank which waited longest waited for data. memory: bytes, by rank.
    peak: FLOP/s of matrix products on every rank, all ranks at once.
    """

    steps: list[StepStats]
    seconds: list[float]
    data_wait: list[float]
    memory: list[int]
    peak: list[float]


def measure(trainer: Trainer, warmup: int, steps: int, on_step: Callable[[], None]) -> Measurement:
    """Takes `warmup` steps, then `steps` timed ones. Every rank must call it.

    No step counts as the last, so that each, as in a long run, prepares the data of the one after it. The peak is
    measured after the steps: its matrices are not part of the run's memory, and the machine is as warm.
    """
    for _ in range(warmup):
        trainer.step(None)
        on_step()
    dist.barrier()
    taken, ends = [], [time.perf_counter()]
    for _ in range(steps):
        taken.append(trainer.step(None))
        ends.append(time.perf_counter())
        on_step()
    seconds = [end - began for began, end in pairwise(ends)]
    memory, waits = _gather(peak_memory(trainer.device)), _gather([step.data_wait for step in taken])
    trainer.loader.close()  # or decoding images would take cores from the matrix products
    peak = peak_rates(trainer.device, getattr(torch, trainer.config.train.dtype))
    return Measurement(taken, seconds, [max(of_ranks) for of_ranks in zip(*waits, strict=True)], memory, peak)


def _gather(value: T) -> list[T]:
    """A value of every rank, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: tensors on a GPU; on a CPU everything resident, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
