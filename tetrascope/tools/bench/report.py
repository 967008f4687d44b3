"""From a measurement to its figures: a table for the terminal, JSON values for the record."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from tetrascope.engine.setup import Setup
from tetrascope.tools.bench.measure import Measurement

RANKS_SHOWN = 8
"""Most ranks whose memory the table lists one by one; the JSON line has them all."""


@dataclass(frozen=True)
class Report:
    """Figures of a benchmark. Times in seconds, memory in bytes, FLOPs of the whole global batch.

    Rates are totals of the timed steps divided by their total time. data_wait_share: of that time, what the rank
    that waited longest in each step spent waiting for data. mfu: FLOP/s of the model against `peak`, the sum of what
    all ranks reach at the same time in a matrix product of the same dtype.
    """

    warmup: int
    steps: int
    step_seconds: list[float]
    step_seconds_median: float
    step_seconds_p10: float
    step_seconds_p90: float
    tokens_per_step: float
    images_per_step: float
    tokens_per_second: float
    images_per_second: float
    data_wait_share: float
    vision_flops_per_step: float
    language_flops_per_step: float
    vision_flops_per_second: float
    language_flops_per_second: float
    flops_per_second: float
    peak_flops_per_second: float
    peak_flops_per_second_by_rank: list[float]
    mfu: float
    memory_min: int
    memory_max: int
    memory_by_rank: list[int]


def summarise(measurement: Measurement, warmup: int) -> Report:
    """The figures of a measurement."""
    steps, seconds, memory = measurement.steps, measurement.seconds, measurement.memory
    count, total, peak = len(steps), sum(seconds), sum(measurement.peak)
    p10, median, p90 = (float(x) for x in np.percentile(seconds, (10, 50, 90)))
    tokens, images = sum(step.tokens for step in steps), sum(step.images for step in steps)
    vision, language = sum(step.vision_flops for step in steps), sum(step.language_flops for step in steps)
    return Report(
        warmup=warmup,
        steps=count,
        step_seconds=seconds,
        step_seconds_median=median,
        step_seconds_p10=p10,
        step_seconds_p90=p90,
        tokens_per_step=tokens / count,
        images_per_step=images / count,
        tokens_per_second=tokens / total,
        images_per_second=images / total,
        data_wait_share=sum(measurement.data_wait) / total,
        vision_flops_per_step=vision / count,
        language_flops_per_step=language / count,
        vision_flops_per_second=vision / total,
        language_flops_per_second=language / total,
        flops_per_second=(vision + language) / total,
        peak_flops_per_second=peak,
        peak_flops_per_second_by_rank=measurement.peak,
        mfu=(vision + language) / total / peak,
        memory_min=min(memory),
        memory_max=max(memory),
        memory_by_rank=memory,
    )


def record(report: Report, setup: Setup, path: Path, overrides: list[str], device: torch.device) -> dict[str, Any]:
    """JSON values: the figures, and what they were measured with."""
    config = setup.config
    return {
        "config": str(path),
        "overrides": overrides,
        "family": setup.family.name,
        "layout": asdict(setup.layout),
        "ranks": setup.layout.world,
        "schedule": config.parallel.schedule,
        "samples": config.batch.samples,
        "batch_tokens": config.batch.tokens,
        "micro_batches": config.batch.per_rank(setup.layout.dp),
        "dtype": config.train.dtype,
        "attention": setup.attention[0],
        "device": device.type,
        "device_name": device_name(device),
        "cores": os.cpu_count(),
        "threads": config.train.threads,
        "torch": torch.__version__,
        **asdict(report),
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself: the GPU's name, or the processor's and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):  # Linux keeps the full name here
        name = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def table(report: Report, setup: Setup) -> Table:
    """The figures for the terminal."""
    title = f"{setup.family.name} on {setup.layout}: {report.steps} steps after {report.warmup} of warm-up"
    out = Table(title=title, show_header=False)
    out.add_column(no_wrap=True)
    out.add_column(justify="right")
    times = f"{report.step_seconds_p10:.3f} to {report.step_seconds_p90:.3f}"
    out.add_row("tokens/s", f"{report.tokens_per_second:,.0f}")
    out.add_row("images/s", f"{report.images_per_second:,.1f}")
    out.add_row("step time, median (p10 to p90)", f"{report.step_seconds_median:.3f} s ({times})")
    out.add_row("waiting for data", f"{report.data_wait_share:.1%}")
    out.add_section()
    out.add_row("vision", _flops(report.vision_flops_per_second))
    out.add_row("language", _flops(report.language_flops_per_second))
    out.add_row("together", _flops(report.flops_per_second))
    out.add_row(f"{setup.config.train.dtype} matrix products, all ranks at once", _flops(report.peak_flops_per_second))
    out.add_row("MFU", f"{report.mfu:.1%}")
    out.add_section()
    memory = report.memory_by_rank
    out.add_row("peak memory of a rank, min to max", f"{_mib(report.memory_min)} to {_mib(report.memory_max)} MiB")
    if 1 < len(memory) <= RANKS_SHOWN:
        out.add_row("by rank", " ".join(_mib(size) for size in memory))
    return out


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.2f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.2f} GFLOP/s"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
