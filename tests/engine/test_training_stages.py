"""Runs that train other parts of the model than the run before them, from its checkpoint.

What must be so follows from AdamW itself: a frozen tensor stays bit for bit, in bf16 at the rounded value of its
source; one that is trained for the first time moves by just lr in each element whose gradient is not tiny, since the
bias-corrected moments of a first step are the gradient and its square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.train_jobs import resume_line, run_steps
from tests.tiny import write_config
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf
from tetrascope.tools.verify.pool import WorkerPool

ALL_BUT_ADAPTOR = "optimizer.modules={vision: {frozen: true}, language: {frozen: true}, embeddings: {frozen: true}}"
VISION_FROZEN = "optimizer.modules={vision: {frozen: true}, adaptor: {lr: 3.0e-3}}"
LR = 1e-2
STEADY = ["optimizer.min_lr_ratio=1.0", "optimizer.weight_decay=0.0", f"optimizer.lr={LR}"]
FOUR = ["parallel.tp=2", "parallel.pp=2"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def run(pool: WorkerPool, config: Path, out: Path, overrides: list[str], world: int, stop: int) -> list[float]:
    """Steps up to number `stop`, from a checkpoint where there is one; the losses."""
    ranks: list[list[dict[str, Any]]] = pool.run(
        run_steps, config, [*STEADY, *overrides, f"output.dir={out}"], stop, out.exists(), world=world
    )
    return [stats["loss"] for stats in ranks[0]]


def weights(out: Path, step: int, dtype: str = "float32") -> dict[str, Tensor]:
    folder = out / f"hf-{step}-{dtype}"
    native_to_hf(out / "checkpoints" / f"step-{step:06d}", folder, dtype)
    return load_file(folder / "model.safetensors")


def _adaptor(name: str) -> bool:
    return name.startswith("visual.merger.")


def _vision(name: str) -> bool:
    return name.startswith("visual.") and not _adaptor(name)


@pytest.mark.parametrize("overrides", [FOUR, ["parallel.dp=4"], []], ids=["same layout", "other layout", "one rank"])
def test_resume_with_frozen_parts_goes_on_as_if_nothing_had_happened(
    pool: WorkerPool, config: Path, tmp_path: Path, overrides: list[str]
) -> None:
    whole = run(pool, config, tmp_path / "whole", [*FOUR, VISION_FROZEN], 4, stop=4)
    run(pool, config, tmp_path / "cut", [*FOUR, VISION_FROZEN], 4, stop=2)
    rest = run(pool, config, tmp_path / "cut", [*overrides, VISION_FROZEN], 4 if overrides else 1, stop=4)
    # fp32 sums in another order: a few unit roundoffs (6e-8) of a loss of size 5, grown over the steps
    assert rest == pytest.approx(whole[2:], rel=1e-5)
    assert overrides != FOUR or rest == whole[2:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adaptor_first_then_everything_then_the_decoder(
    pool: WorkerPool, config: Path, tmp_path: Path, dtype: str
) -> None:
    """Three stages of training in one output folder, each in a layout of its own."""
    out, precision = tmp_path / "run", f"train.dtype={dtype}"
    run(pool, config, out, [precision], 1, stop=0)
    start = weights(out, 0)
    run(pool, config, out, [precision, ALL_BUT_ADAPTOR, *FOUR], 4, stop=2)
    adaptor_trained = weights(out, 2)
    for name, value in adaptor_trained.items():
        rounded = start[name].to(getattr(torch, dtype)).float()
        assert torch.equal(value, rounded) != _adaptor(name), name

    (line,) = pool.run(resume_line, config, [f"output.dir={out}", precision], world=1)
    frozen = sum(not _adaptor(name) for name in start)
    assert f"; {frozen} tensors newly trained: their moments and Adam's step count start at zero" in line
    run(pool, config, out, [precision, "parallel.dp=2"], 2, stop=3)
    everything_trained = weights(out, 3)
    new = [name for name in start if not _adaptor(name) and name.endswith("weight")]
    for name in new:
        moved = (everything_trained[name] - adaptor_trained[name]).abs().max().item()
        assert moved == pytest.approx(LR, rel=0.02), name
    assert json.loads((out / "checkpoints" / "step-000003" / "state.json").read_text())["adam_steps"] == 1

    run(pool, config, out, [precision, VISION_FROZEN, "parallel.pp=2"], 2, stop=4)
    decoder_trained = weights(out, 4)
    for name, value in decoder_trained.items():
        rounded = everything_trained[name].to(getattr(torch, dtype)).float()
        assert torch.equal(value, rounded) == _vision(name), name
    assert json.loads((out / "checkpoints" / "step-000004" / "state.json").read_text())["adam_steps"] == 2


def test_a_frozen_tensor_has_no_moments_in_the_checkpoint(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    run(pool, config, tmp_path / "run", ["train.dtype=bfloat16", VISION_FROZEN, *FOUR], 4, stop=1)
    saved = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-000001").read_metadata().state_dict_metadata
    names = {name for name in saved if not name.startswith("optimizer.")}
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {n for n in names if f"optimizer.{moment}.{n}" not in saved} == {n for n in names if _vision(n)}
    kinds = {name: saved[name].properties.dtype for name in names}
    assert {n for n, dtype in kinds.items() if dtype == torch.bfloat16} == {n for n in names if _vision(n)}
