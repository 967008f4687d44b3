"""A configuration of which no file is there, and what follows from it."""

from __future__ import annotations

from typing import Any

from tetrascope.engine.config import Config
from tetrascope.engine.config_file import validated
from tetrascope.engine.modules import trained
from tetrascope.engine.plan import CostModel
from tetrascope.engine.predict import Hardware, Link
from tetrascope.engine.setup import Blueprint, blueprint
from tetrascope.tools.plan.workload import Mix, Workload


def raw(preset: str = "2b", batch: dict[str, Any] | None = None, **data: object) -> dict[str, Any]:
    """The configuration, as its file has it."""
    return {
        "model": {"family": "qwen2_vl", "preset": preset},
        "data": {"train": "no-such-file.jsonl", "tokenizer": "no-such-folder", **data},
        "batch": batch or {"samples": 64, "micro_batches": 8},
        "optimizer": {"lr": 1e-5},
        "train": {"steps": 1, "dtype": "bfloat16"},
        "output": {"dir": "no-such-run"},
    }


def made(preset: str = "2b", batch: dict[str, Any] | None = None, **data: object) -> Blueprint:
    return blueprint(validated(Config, raw(preset, batch, **data), "test"), None)


def workload(one: Blueprint, mix: Mix | None = None) -> Workload:
    return Workload(one, CostModel(one.model_config, trained(one.modules)), mix or Mix())


def hardware(memory: float = 80e9, latency: float = 1e-5, bandwidth: float = 1e11) -> Hardware:
    """A machine of round numbers."""
    return Hardware(
        name="round",
        gpus_per_node=8,
        memory_bytes=memory,
        peak_flops={"bfloat16": 1e15, "float32": 1e14},
        matmul_share=0.5,
        attention_share=0.25,
        memory_bandwidth=2e12,
        intra_node=Link(latency, 4 * bandwidth),
        inter_node=Link(latency, bandwidth),
        kernel_seconds=0.0,
    )
