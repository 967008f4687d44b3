"""What long sequences save memory with computes the same: loss a few rows at a time, MLPs in tiles, recomputation.

Oracle: transformers in one process, as in the certificate, with its bounds; `loss_rows` and `mlp_rows` are so small
that every micro-batch has many chunks, the last one shorter. Logits of the certificate are then those of the head's
input, so that it is compared too.
"""

from __future__ import annotations

import functools

import pytest

from tetrascope.parallel.mesh import Layout
from tetrascope.tools.verify.case import Case, Numbers
from tetrascope.tools.verify.certificate import verify_row
from tetrascope.tools.verify.families.qwen2_vl import make_case, reference
from tetrascope.tools.verify.layouts import Row
from tetrascope.tools.verify.pool import WorkerPool
from tetrascope.tools.verify.run import global_batches

ROWS = [
    Row(Layout(), 2, "1f1b", loss_rows=7),
    Row(Layout(), 2, "1f1b", mlp_rows=7),
    Row(Layout(tp=2), 2, "1f1b", loss_rows=9, mlp_rows=10),
    Row(Layout(ring=2), 2, "1f1b", recompute="full", loss_rows=9, mlp_rows=10),
    Row(Layout(ulysses=2, tp=2), 2, "1f1b", recompute="full", loss_rows=9, mlp_rows=10),
    Row(Layout(pp=2), 3, "zb-h1", loss_rows=9, mlp_rows=10),
    Row(Layout(tp=2, pp=2), 3, "zb-v", loss_rows=9, mlp_rows=10),
]


@functools.cache
def _reference(tied: bool) -> tuple[Case, Numbers]:
    case = make_case(steps=2, tied=tied)
    return case, reference(case, global_batches(case))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.layout}-{r.schedule}-{r.loss_rows}-{r.mlp_rows}")
def test_parity(pool: WorkerPool, row: Row, tied: bool) -> None:
    case, expected = _reference(tied)
    verdict = verify_row(pool, "long", case, expected, row)
    assert verdict.passed, verdict
