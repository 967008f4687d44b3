"""What the ranks of the conversion tests do, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny import write_tokenizer
from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.checkpoint import load_checkpoint, save_checkpoint
from tetrascope.engine.config import Config, OptimizerSection, ParallelSection
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Workload, make_pipeline
from tetrascope.engine.source import HuggingFaceFolder, read_hf_config
from tetrascope.models.family import Family, get_family
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.zero.optimizer import ZeroAdamW


def build(family: Family, config: Any, layout: Layout) -> tuple[StageModel, ZeroAdamW]:
    """This rank's part of a model, as a run makes it."""
    mesh = Mesh(layout, "cpu")
    options = OptimizerSection(lr=1e-3)
    modules = family_modules(family, config, options)
    cut = make_pipeline(family, config, ParallelSection(pp=layout.pp), modules, Workload(1)).cut
    model = StageModel(family, config, mesh, cut, sdpa_attention, torch.float32, modules)
    return model, build_optimizer(model, options, torch.device("cpu"))


def hf_to_native(family_name: str, folder: Path, destination: Path, layout: Layout) -> str:
    """Loads a Hugging Face folder as a run does and saves it unchanged; returns the checkpoint layout it had."""
    family = get_family(family_name)
    config: Any = family.from_hf(read_hf_config(folder))
    model, optimizer = build(family, config, layout)
    source = HuggingFaceFolder(folder, family.layouts, config)
    source.check()
    model.load(source, optimizer)
    description = {"family": family.name, "model": dataclasses.asdict(config), "config": run_config(destination)}
    save_checkpoint(destination, 0, model, optimizer, description)
    return source.layout


def shards_loaded(
    family_name: str, folder: Path, checkpoint: Path, layout: Layout
) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Loads a native checkpoint as a run that goes on does; what this rank then holds: name, offset, numbers."""
    family = get_family(family_name)
    model, optimizer = build(family, family.from_hf(read_hf_config(folder)), layout)
    step, fresh = load_checkpoint(checkpoint, model, optimizer)
    assert step == 0 and set(fresh) == model.trained_tensors()
    held = [shard for group in optimizer.groups for _, shard in model.flat_shards(group, group.values)]
    return [(shard.name, shard.offset, shard.tensor.clone()) for shard in held]


def run_config(folder: Path) -> dict[str, Any]:
    """A run's configuration, of which the conversion needs the tokenizer and the sizes of pictures."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    config = Config.model_validate(
        {
            "model": {"family": "qwen2_vl", "init_from": str(folder)},
            "data": {"train": str(folder / "train.jsonl"), "tokenizer": str(tokenizer)},
            "batch": {"samples": 1},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1},
            "output": {"dir": str(folder)},
        }
    )
    return json.loads(config.model_dump_json())
