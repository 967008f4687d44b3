"""Freezing and learning rates by module: every layout computes what one process of transformers computes.

The oracle is transformers' model with requires_grad False on what is frozen and torch's AdamW with a parameter group
for each tensor. What is frozen is told to it by Hugging Face names through the weight map; that the right tensors
stay is checked against prefixes of those names, written here. A frozen tensor that took part in the gradient norm
would change the clipping, and so all weights; a rate given to the wrong module shows in its weights. With one sample
a micro-batch, text alone among them, a stage that waits for a gradient that nobody sends would hang.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tools.verify.module_jobs import gradients_sent
from tetrascope.engine.config import ModuleSettings
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.verify.case import Case, Numbers
from tetrascope.tools.verify.certificate import GRADIENT_BOUND, LOSS_BOUND, WEIGHT_BOUND
from tetrascope.tools.verify.families import get_oracle
from tetrascope.tools.verify.layouts import Row
from tetrascope.tools.verify.pool import WorkerPool
from tetrascope.tools.verify.run import compare, global_batches, planner, relative_losses, run_layout

FROZEN = ModuleSettings(frozen=True)
ADAPTOR, VISION, EMBEDDINGS = "visual.merger.", "visual.", ("lm_head.", "model.embed_tokens.")
LOWER = ("model.layers.0.", "model.layers.1.", "model.layers.2.", "model.layers.3.")

MODULES: dict[str, tuple[str, dict[str, ModuleSettings]]] = {
    "vision frozen": ("untied", {"vision": FROZEN}),
    "adaptor alone": ("untied", {"vision": FROZEN, "language": FROZEN, "embeddings": FROZEN}),
    "own rates": (
        "untied",
        {
            "language": FROZEN,
            "vision": ModuleSettings(lr=2e-3),
            "adaptor": ModuleSettings(lr=3e-2, weight_decay=0.0),
            r"vision\.blocks\.1\.mlp\..*": ModuleSettings(weight_decay=0.5),
        },
    ),
    "last layer and norm": (
        "untied",
        {"vision": FROZEN, "adaptor": FROZEN, "embeddings": FROZEN, r"layers\.[0-3]\..*": FROZEN},
    ),
    "tied, language frozen": ("tied", {"language": FROZEN, "embeddings": ModuleSettings(lr=3e-3)}),
    "tied, embeddings frozen": ("tied", {"embeddings": FROZEN, "language": ModuleSettings(lr=2e-2)}),
}
"""Case of the certificate, and the modules of its optimizer."""

LAYOUTS = [
    (Layout(), 8),
    (Layout(tp=2), 8),
    (Layout(pp=2), 8),
    (Layout(pp=4), 8),
    (Layout(dp=2), 4),
    (Layout(tp=2, pp=2), 8),
]
"""With micro-batches for each data-parallel rank: one sample in each."""


def stays(name: str, tensor: str) -> bool:
    """Whether a Hugging Face tensor must keep its value, by its name."""
    adaptor = tensor.startswith(ADAPTOR)
    vision = tensor.startswith(VISION) and not adaptor
    embeddings = tensor.startswith(EMBEDDINGS)
    language = not (adaptor or vision or embeddings)
    return {
        "vision frozen": vision,
        "adaptor alone": not adaptor,
        "own rates": language,
        "last layer and norm": not language or tensor.startswith(LOWER),
        "tied, language frozen": language,
        "tied, embeddings frozen": embeddings,
    }[name]


@functools.cache
def _reference(name: str) -> tuple[Case, Numbers]:
    oracle: Any = get_oracle("qwen2_vl")
    variant, modules = MODULES[name]
    case: Case = oracle.variants()[variant]
    case = replace(case, optimizer=case.optimizer.model_copy(update={"modules": modules}))
    return case, oracle.reference(case, global_batches(case))


@pytest.mark.parametrize("name", MODULES)
def test_the_oracle_keeps_what_is_frozen_and_moves_the_rest(name: str) -> None:
    case, expected = _reference(name)
    for tensor, value in expected.weights.items():
        assert torch.equal(value, case.weights[tensor]) == stays(name, tensor), tensor
        assert (tensor in expected.gradients) != stays(name, tensor), tensor


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("layout", "micro_batches"), LAYOUTS, ids=lambda value: str(value))
def test_layout_equals_one_process(pool: WorkerPool, name: str, layout: Layout, micro_batches: int) -> None:
    """Bounds: certificate.py. What is frozen must stay bit for bit, on every rank."""
    case, expected = _reference(name)
    ranks = pool.run(run_layout, case, Row(layout, micro_batches, "1f1b"), world=layout.world)
    gradients = compare([shard for rank in ranks for shard in rank.gradients], expected.gradients)
    weights = compare([shard for rank in ranks for shard in rank.weights], expected.weights, case.weights)
    assert max(gradients.values()) <= GRADIENT_BOUND, max(gradients, key=gradients.__getitem__)
    assert max(weights.values()) <= WEIGHT_BOUND, max(weights, key=weights.__getitem__)
    assert max(relative_losses(rank.losses, expected) for rank in ranks) <= LOSS_BOUND
    assert [tensor for tensor in weights if stays(name, tensor) and weights[tensor] != 0] == []


def test_some_micro_batches_are_text_alone() -> None:
    case, _ = _reference("adaptor alone")
    batches = [planner(case, Layout(pp=2), 8).plan(step).micro_batches[0] for step in range(case.steps)]
    images = [
        [any(VISION_TOKEN in case.documents[i].ids_T for i in micro.samples) for micro in step] for step in batches
    ]
    assert all(any(step) and not all(step) for step in images)


VISION_TOKEN = 2
"""Begins every image and video of the case."""


@pytest.mark.parametrize(("name", "expected"), [("adaptor alone", 8), ("last layer and norm", 0)])
def test_gradients_cross_a_border_only_to_something_trained(pool: WorkerPool, name: str, expected: int) -> None:
    """One gradient for each of eight micro-batches; none where all of stage 0 is frozen."""
    case, _ = _reference(name)
    sent = pool.run(gradients_sent, replace(case, steps=1), Layout(pp=2), 8, world=2)
    assert sent == [0, expected]
