"""Measures a hardware profile on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from tetrascope.engine.predict.hardware import Hardware, Link, load_hardware
from tetrascope.models.layers.attention import pick_attention
from tetrascope.models.layers.packed import Packed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_SECONDS = 0.15
"""How long each thing is measured at least."""


def calibrate(device: str, group: dist.ProcessGroup | None = None) -> Hardware:
    """A profile of this machine, in less than 20 s: one process, with as many threads as torch has been given.

    group: of two ranks, both of which call this; the links are then measured between them, and both are taken to be
    alike. Without one, and for memory and the size of a node on the CPU, figures are those of the built-in profile.
    """
    base = load_hardware("cpu" if device == "cpu" else "h100-sxm")
    peaks, shares = {}, []
    for name, dtype in DTYPES.items():
        best, typical = _matmul_rates(device, dtype)
        peaks[name] = best
        shares.append(typical / best)
    name, attention = _main_dtype(device), _attention_rate(device)
    found = replace(
        base,
        name=device,
        peak_flops=peaks,
        matmul_share=min(1.0, shares[list(DTYPES).index(name)]),
        attention_share=min(1.0, attention / peaks[name]),
        memory_bandwidth=_memory_bandwidth(device),
        kernel_seconds=_kernel_seconds(device),
    )
    if device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        found = replace(found, memory_bytes=0.97 * total, gpus_per_node=torch.cuda.device_count())
    if group is not None:
        link = measure_link(device, group)
        found = replace(found, intra_node=link, inter_node=link)
    return found


def _main_dtype(device: str) -> str:
    """The dtype that one trains in."""
    return "float32" if device == "cpu" else "bfloat16"


def measure_link(device: str, group: dist.ProcessGroup) -> Link:
    """Latency and bandwidth between the two ranks of a group, from there and back. Both ranks must call it."""
    large = 16 * 2**20 if device == "cpu" else 256 * 2**20

    def seconds(size: int) -> float:
        tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        me, other = group.rank(), dist.get_global_rank(group, 1 - group.rank())

        def there_and_back() -> None:
            for sender in (0, 1):
                (dist.send if me == sender else dist.recv)(tensor, other, group=group)

        times = []
        for _ in range(12):
            start = time.perf_counter()
            there_and_back()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:]) / 2

    latency = seconds(1)
    return Link(latency=latency, bandwidth=large / max(seconds(large) - latency, 1e-9))


def _matmul_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of the best shape, and of the median one."""
    shapes = [(512, 1024, 1024), (512, 1024, 4096), (1024, 2048, 2048), (512, 4096, 1024)]
    if device != "cpu":
        shapes = [(rows * 8, k * 4, n * 4) for rows, k, n in shapes]
    rates = []
    for rows, k, n in shapes:
        a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, k), (n, k)))
        rates.append(2.0 * rows * k * n / _seconds(partial(torch.nn.functional.linear, a, b), device))
    return max(rates), statistics.median(rates)


def _attention_rate(device: str) -> float:
    """FLOP/s of the causal kernel's forward, counting the pairs that are attended to."""
    rows, heads, width = (1024, 8, 64) if device == "cpu" else (8192, 16, 128)
    dtype = DTYPES[_main_dtype(device)]
    q, k, v = (torch.randn(rows, heads, width, device=device).to(dtype) for _ in range(3))
    packed, attend = Packed((rows,)), pick_attention("auto")[1]
    return 4.0 * heads * width * rows * (rows + 1) / 2 / _seconds(lambda: attend(q, k, v, packed, causal=True), device)


def _memory_bandwidth(device: str) -> float:
    """Bytes/s of an elementwise product: two reads and a write, of tensors as large as a layer's."""
    rows, width = (512, 2048) if device == "cpu" else (8192, 16384)
    a, b = (torch.randn(rows, width, device=device) for _ in range(2))
    return 3.0 * a.nbytes / _seconds(lambda: a * b, device)


def _kernel_seconds(device: str) -> float:
    """Seconds of a kernel that does next to nothing."""
    a = torch.zeros(16, device=device)
    return _seconds(lambda: a + a, device)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call: of batches of calls, after a warm-up, the one that was disturbed least."""
    run()
    calls = max(1, int(LEAST_SECONDS / 5 / max(_once(run, device), 1e-7)))
    return min(_once(run, device, calls) / calls for _ in range(5))


def _once(run: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds of some calls in a row. On the CPU, of its own time: what else the machine does takes none of it."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / torch.get_num_threads()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
