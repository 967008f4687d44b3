"""What the hardware does at most: the yardstick of model FLOP/s utilisation.

A vendor's figure does not exist for every CPU, and where ranks share the cores of a machine, or GPUs share its power
limit, one rank alone would reach a rate that all of them together never can. So every rank multiplies large matrices,
all ranks at the same time, and the peak of the run is the sum of their rates: how many cores there are, and how many
ranks share them, need not be known. The matrices have the run's dtype, and torch's settings (threads, TF32) are the
run's own.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices: large enough for the full rate, small enough to end soon on a shared core."""

WINDOW_SECONDS = 1.0
WINDOWS = 3


def peak_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    """FLOP/s of every rank, by rank, in the window in which all ranks together did most. Every rank must call it.

    The best of several windows, since anything else that runs on the machine can only take away from it.
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    done = torch.zeros(WINDOWS, dist.get_world_size(), dtype=torch.float64, device=device)
    spent = torch.zeros_like(done)
    for window in range(WINDOWS):
        place = window, dist.get_rank()
        done[place], spent[place] = multiply_together(a, b, out, WINDOW_SECONDS)
    dist.all_reduce(done)
    dist.all_reduce(spent)
    # Divided by the longest time, not each by its own: a rank that the system lets start late computes on while the
    # others have ended, at a rate that it would not reach beside them, and rates of different times do not add up.
    rates = done / spent.amax(1, keepdim=True)
    best: list[float] = rates[rates.sum(1).argmax()].tolist()
    return best


def multiply_together(a: Tensor, b: Tensor, out: Tensor, seconds: float) -> tuple[float, float]:
    """Repeats a·b for `seconds` on all ranks; FLOPs done on this one, and the seconds until the last rank was done."""
    torch.mm(a, b, out=out)  # the first call plans the product and wakes the threads
    _finish(a.device)
    dist.barrier()
    products, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, b, out=out)
        _finish(a.device)
        products += 1
    dist.barrier()
    return products * 2.0 * a.shape[0] ** 3, time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
