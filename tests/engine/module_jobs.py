"""What the ranks of test_modules.py do, by name."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.config import OptimizerSection, ParallelSection
from tetrascope.engine.data.collate import collate
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Workload, make_pipeline
from tetrascope.engine.source import memory_source
from tetrascope.models.family import get_family
from tetrascope.models.layers.attention import pick_attention
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.zero.optimizer import ZeroAdamW
from tetrascope.tools.verify.case import Case


def _build(case: Case, options: OptimizerSection, dtype: torch.dtype) -> StageModel:
    family = get_family(case.family)
    modules = family_modules(family, case.config, options)
    mesh = Mesh(Layout(), "cpu")
    cut = make_pipeline(family, case.config, ParallelSection(), modules, Workload(1)).cut
    return StageModel(family, case.config, mesh, cut, pick_attention("auto")[1], dtype, modules)


class _Saved:
    """Counts the bytes of activations that a module's forward keeps for the backward."""

    def __init__(self, module: nn.Module, params: set[int]) -> None:
        self.nbytes, self._params = 0, params
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def _leave(self, *_: Any) -> None:
        self._hooks.__exit__()

    def _pack(self, tensor: Tensor) -> Tensor:
        # Weights are kept for the gradient of a linear's input, but they are there anyway.
        if tensor.untyped_storage().data_ptr() not in self._params:
            self.nbytes += tensor.nbytes
        return tensor


def saved_bytes(case: Case, options: OptimizerSection) -> dict[str, int]:
    """Bytes of activations kept by the parts of the model in the forward of a micro-batch, and all of the model."""
    device = torch.device("cpu")
    model = _build(case, options, torch.float32)
    optimizer = build_optimizer(model, options, device)
    model.load(memory_source(case.weights), optimizer)
    documents = case.documents[: case.batch]
    rows = sum(len(d.ids_T) for d in documents)
    batch = collate(documents, get_family(case.family), case.config, rows, 1, 0, True, device)
    params = {group.params.untyped_storage().data_ptr() for group in optimizer.groups}
    parts = {name: module for name, module in model.chunks[0].named_children() if name != "layers"}
    parts.update({f"layers.{i}": module for i, module in model.chunks[0].get_submodule("layers").named_children()})
    counts = {name: _Saved(module, params) for name, module in parts.items()}
    model.chunks[0](batch.inputs)
    return {name: count.nbytes for name, count in counts.items()}


def _memory() -> int:
    """Bytes of all CPU tensors that are alive, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def training_bytes(case: Case, options: OptimizerSection, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes that parameters, gradients, masters and moments take; elements trained; elements frozen."""
    model = _build(case, options, dtype)
    before = _memory()
    optimizer: ZeroAdamW = build_optimizer(model, options, torch.device("cpu"))
    for group in optimizer.groups:
        optimizer.state(group)
    taken = _memory() - before
    trained = sum(placed.param.numel() for placed in model.placed.values() if placed.param.requires_grad)
    return taken, trained, sum(placed.param.numel() for placed in model.placed.values()) - trained
