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

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices: large enough for the full rate, small enough to end soon on a shared core."""

WINDOW_SECONDS = 0.5
WINDOWS = 3


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of square matrix products on this rank, repeated for at least `seconds`."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # the first call plans the product and wakes the threads
    _finish(device)
    dist.barrier()
    products, began, spent = 0, time.perf_counter(), 0.0
    while spent < seconds:
        torch.mm(a, b, out=out)
        _finish(device)
        products += 1
        spent = time.perf_counter() - began
    return products * 2.0 * side**3 / spent


def peak_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    """FLOP/s of every rank, by rank, in the window in which all ranks together did most. Every rank must call it.

    The best of several windows, since anything else that runs on the machine can only take away from it.
    """
    rates = torch.zeros(WINDOWS, dist.get_world_size(), dtype=torch.float64, device=device)
    for window in range(WINDOWS):
        rates[window, dist.get_rank()] = matmul_rate(device, dtype, WINDOW_SECONDS)
    dist.all_reduce(rates)
    best: list[float] = rates[rates.sum(1).argmax()].tolist()
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
