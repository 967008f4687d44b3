"""Every schedule computes what one process of transformers computes, on a model deep enough for twelve chunks.

Seven micro-batches, which divide by no number of stages, of unequal lengths, some of them text alone; heads of their
own and tied ones; vision trained and frozen, and all frozen but the adaptor. Errors and bounds: certificate.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tetrascope.engine.config import ModuleSettings
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
    "vision frozen": {"vision": FROZEN},
    "adaptor alone": {"vision": FROZEN, "language": FROZEN, "embeddings": FROZEN},
}
MICRO_BATCHES = 7
LAYERS = 12
SCALE = 3.0
"""Of the weights; twelve layers of the certificate's 6 would magnify rounding beyond its bounds."""


def rows() -> list[Row]:
    found = []
    for pp in (2, 4):
        layout = Layout(pp=pp)
        for number, (schedule, virtual) in enumerate(
            [("gpipe", None), ("1f1b", None), ("interleaved", 2), ("interleaved", 3), ("zb-h1", None), ("zb-v", None)]
        ):
            apart = (number + pp // 2) % 2 == 0  # every schedule with the vision encoder as a chunk, on one of the two
            found.append(Row(layout, MICRO_BATCHES, schedule, virtual, apart))
        found += [
            Row(layout, MICRO_BATCHES, "cost"),
            Row(layout, MICRO_BATCHES, "cost", 2, recompute="full"),
            Row(layout, MICRO_BATCHES, "cost", placement="fold"),
        ]
    return found


@functools.cache
def _reference(tied: bool, modules: str) -> tuple[Case, Numbers]:
    case = make_case(tied=tied, steps=2, layers=LAYERS, scale=SCALE)
    case = replace(case, optimizer=case.optimizer.model_copy(update={"modules": MODULES[modules]}))
    return case, reference(case, global_batches(case))


@pytest.mark.parametrize(
    ("tied", "modules"),
    [(False, "trained"), (True, "trained"), (True, "vision frozen"), (False, "adaptor alone")],
)
@pytest.mark.parametrize("row", rows(), ids=str)
def test_schedule_equals_one_process(pool: WorkerPool, row: Row, tied: bool, modules: str) -> None:
    case, expected = _reference(tied, modules)
    verdict = verify_row(pool, "deep", case, expected, row)
    assert verdict.passed, verdict


def test_some_micro_batches_are_text_alone_and_they_are_unequal() -> None:
    case, _ = _reference(False, "trained")
    plan = planner(case, Layout(), MICRO_BATCHES).plan(0)
    micros = [[case.documents[plan.draws[i].sample] for i in micro.samples] for micro in plan.micro_batches[0]]
    assert {any(d.media for d in micro) for micro in micros} == {True, False}
    assert len({sum(len(d.ids_T) for d in micro) for micro in micros}) > 1
