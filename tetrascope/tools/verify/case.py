"""What is compared: a model small enough for one process, batches that show mistakes, and the reference's numbers.

The oracle is the family's implementation in transformers, run in one process, one sample at a time, without packing
or padding, in fp32. It shares no code with this package. What would hide a mistake is avoided: default-initialised
weights are nearly blind to positions (attention is flat), so matrices are scaled up; samples have images of different
sizes, several images, a video whose frames outnumber its rows, and no image at all; the vocabulary does not divide
by the tensor-parallel degree; the gradient norm is clipped, so that a wrong norm shows in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.data.document import Document
from tetrascope.engine.modules import ModuleOptions, family_modules
from tetrascope.models.family import get_family
from tetrascope.models.weights import RenamingRules, WeightMap


@dataclass(frozen=True)
class Case:
    """A model with its weights (Hugging Face names), and samples to train it on.

    batch: samples in a global batch; the plan chooses which. steps: optimizer steps to take. yardsticks: (regular
    expression, replacement) of tensors whose gradient is zero in exact arithmetic, so that nothing but rounding is left
    of it, and of the tensors by whose gradients and changes that rounding is measured.
    """

    family: str
    config: Any
    weights: dict[str, Tensor]
    documents: tuple[Document, ...]
    batch: int
    steps: int
    optimizer: OptimizerSection
    yardsticks: RenamingRules = ()


@dataclass(frozen=True)
class Numbers:
    """What a run gives: logits of the first step, `[T, V]` for each sample of its batch, the loss of every step,
    gradients of the first, weights after the last (Hugging Face names)."""

    logits: list[Tensor]
    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


KEY_BIASES: RenamingRules = ((r"(vision_tower[./].*)\.k_proj\.bias", r"\1.q_proj.bias"),)
"""Yardsticks of an encoder without rotary positions: a bias of the keys adds the same to all scores of a query, which
softmax takes away again. Its gradient is a sum over the same rows as that of the queries' bias."""

OPTIMIZER = OptimizerSection(lr=1e-2, min_lr_ratio=1.0, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1, clip=1.0)
"""eps is large on purpose. AdamW divides by |g| + eps: with a tiny eps an element whose gradient is all rounding
noise moves by a full ±lr in a random direction, and no comparison of weights means anything. With gradients clipped
to norm 1 and eps 1e-2, an update changes by at most (1 + 1/eps) ≈ 100 times the relative gradient error."""


def tensor_options(case: Case, weights: WeightMap | None = None) -> dict[str, ModuleOptions]:
    """Options of every Hugging Face tensor, from those of the parameters that it is part of.

    weights: map of the layout whose tensors are meant; None: the canonical one. A vector has no weight decay, however
    many dimensions it has on disk (a class token of shape `[1, 1, E]`).
    """
    family = get_family(case.family)
    weights = family.weights(case.config) if weights is None else weights
    modules = family_modules(family, case.config, case.optimizer)
    return {
        piece.tensor.name: own if len(piece.tensor.matrix) > 1 else replace(own, weight_decay=0.0)
        for own, pieces in ((modules[name], pieces) for name, pieces in weights.items())
        for piece in pieces
    }


def train_reference(
    model: torch.nn.Module,
    forward: Any,
    batches: Sequence[Sequence[Document]],
    options: OptimizerSection,
    name_on_disk: Any,
    modules: Mapping[str, ModuleOptions] | None = None,
) -> Numbers:
    """Trains the oracle: gradients of Σ weight·CE / Σ weight over each global batch, torch's own clip and AdamW.

    forward: (model, document) -> logits `[T, V]` of one sample. name_on_disk: parameter name -> name in the checkpoint.
    modules: what `tensor_options` gives; without it, everything is trained alike. A frozen parameter has
    requires_grad False, and is in the weights of the result but not in the gradients.
    """
    params = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    for name, param in params.items():
        own = modules[name_on_disk(name)] if modules else ModuleOptions(False, options.lr, options.weight_decay)
        param.requires_grad_(not own.frozen)
        if not own.frozen:
            groups.append({"params": [param], "lr": own.lr, "weight_decay": own.weight_decay * (param.ndim > 1)})
    adam = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, foreach=False)
    first_logits: list[Tensor] = []
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for batch in batches:
        for param in params.values():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
        total = float(sum(d.weights_T[1:].sum() for d in batch))
        loss = 0.0
        for document in batch:
            logits = forward(model, document)
            if not losses:
                first_logits.append(logits.detach())
            part = _loss_sum(logits, document) / total
            if part.requires_grad:  # not so for text where nothing but the vision part is trained
                part.backward()
            loss += part.item()
        losses.append(loss)
        if not gradients:
            gradients = {name_on_disk(n): p.grad.clone() for n, p in params.items() if p.grad is not None}
        if options.clip is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), options.clip)
        adam.step()
    weights = {name_on_disk(n): p.detach().clone() for n, p in params.items()}
    return Numbers(first_logits, losses, gradients, weights)


def _loss_sum(logits_TV: Tensor, document: Document) -> Tensor:
    """Σ weight·CE of one sample: row i predicts token i+1."""
    labels = torch.from_numpy(document.ids_T[1:])
    losses = torch.nn.functional.cross_entropy(logits_TV[:-1], labels, reduction="none")
    return (losses * torch.from_numpy(document.weights_T[1:])).sum()
