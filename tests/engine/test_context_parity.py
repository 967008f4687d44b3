"""Context parallelism computes what one process of transformers computes: ring, Ulysses and both.

Packs of unequal documents; micro-batches of one sample each, text alone or with images, so that some ranks encode
nothing; more Ulysses ranks than key heads; everything trained, and the adaptor alone. The certificate's rows join
context parallelism with the other axes, for every family. Errors and bounds: certificate.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tetrascope.engine.config import ModuleSettings
from tetrascope.engine.data.collate import SharedPack, collate
from tetrascope.engine.data.document import ContextPlace
from tetrascope.models.family import get_family
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.verify.case import Case, Numbers
from tetrascope.tools.verify.certificate import verify_row
from tetrascope.tools.verify.families.qwen2_vl import make_case, reference
from tetrascope.tools.verify.layouts import Row
from tetrascope.tools.verify.pool import WorkerPool
from tetrascope.tools.verify.run import global_batches, planner

FROZEN = ModuleSettings(frozen=True)
MODULES = {
    "trained": {},
    "adaptor alone": {"vision": FROZEN, "language": FROZEN, "embeddings": FROZEN},
    "vision frozen": {"vision": FROZEN, "adaptor": FROZEN},
}
DEGREES = [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (2, 4), (4, 2)]


@functools.cache
def _reference(modules: str) -> tuple[Case, Numbers]:
    case = make_case(steps=2)
    case = replace(case, optimizer=case.optimizer.model_copy(update={"modules": MODULES[modules]}))
    return case, reference(case, global_batches(case))


@pytest.mark.parametrize(("modules", "micro_batches"), [("trained", 1), ("trained", 8), ("adaptor alone", 8)])
@pytest.mark.parametrize(("ring", "ulysses"), DEGREES)
def test_degrees(pool: WorkerPool, ring: int, ulysses: int, modules: str, micro_batches: int) -> None:
    case, expected = _reference(modules)
    verdict = verify_row(
        pool, "context", case, expected, Row(Layout(ring=ring, ulysses=ulysses), micro_batches, "1f1b")
    )
    assert verdict.passed, verdict


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 1)])
def test_a_frozen_encoder_gets_no_gradients_back(pool: WorkerPool, ring: int, ulysses: int) -> None:
    case, expected = _reference("vision frozen")
    verdict = verify_row(pool, "context", case, expected, Row(Layout(ring=ring, ulysses=ulysses), 8, "1f1b"))
    assert verdict.passed, verdict


def test_there_are_more_ulysses_ranks_than_key_heads() -> None:
    assert _reference("trained")[0].config.decoder.kv_heads < max(ulysses for _, ulysses in DEGREES)


@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.parametrize("ring", [2, 4])
def test_documents_are_cut_and_some_ranks_encode_nothing(ring: int, micro_batches: int) -> None:
    """Otherwise nothing of the ring or of the exchange would be seen."""
    case, _ = _reference("trained")
    family, layout = get_family(case.family), Layout(ring=ring)
    plan = planner(case, layout, micro_batches).plan(0)
    cut, empty = [], []
    for micro in plan.micro_batches[0]:
        documents = [case.documents[plan.draws[place].sample] for place in micro.samples]
        for rank in range(ring):
            place = ContextPlace(ring, 1, rank, 0)
            inputs = collate(documents, family, case.config, micro.rows, 1, 0, True, torch.device("cpu"), place).inputs
            assert isinstance(inputs.documents, SharedPack)
            cut.append(any(inputs.documents.context.cut))
            if inputs.vision is not None:
                empty.append(len(inputs.vision.patches_NP) == 0)
    assert np.mean(cut) > 0.5
    assert any(empty) == (micro_batches == 8)
