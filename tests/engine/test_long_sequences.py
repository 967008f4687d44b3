"""What long sequences save memory with computes the same: loss a few rows at a time, MLPs in tiles, recomputation.

Oracle: transformers in one process, as in the certificate, with its bounds; `loss_rows` and `mlp_rows` are so small
that every micro-batch has many chunks, the last one shorter. Logits of the certificate are then those of the head's
input, so that it is compared too.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tetrascope.parallel.mesh import Layout
from tetrascope.tools.bench.long_jobs import Job, train_step, unequal
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


JOB = Job(unequal(700, (5, 3, 2), visual=True, side=8), ring=2, ulysses=2, loss_rows=64, mlp_rows=64)


def test_recomputation_does_not_run_the_ring_again(pool: WorkerPool) -> None:
    """Nor the gradients' transfers, which are of the backward anyway; Ulysses' way in is repeated, its way out too."""
    plain = pool.run(train_step, replace(JOB, recompute="none"), world=4)
    again = pool.run(train_step, JOB, world=4)
    assert [r.loss for r in plain] == [r.loss for r in again]
    for once, twice in zip(plain, again, strict=True):
        assert once.sent["ring kv"] > 0 and once.sent["ring dkv"] > 0
        assert {k: v for k, v in twice.sent.items() if "ring" in k} == {
            k: v for k, v in once.sent.items() if "ring" in k
        }
        assert twice.sent["ulysses"] == pytest.approx(1.5 * once.sent["ulysses"])  # forward, forward, backward


def test_logits_are_never_whole(pool: WorkerPool) -> None:
    """A vocabulary so large that logits outweigh all else: rows · vocab · 4 bytes, a few times in the loss."""
    job = replace(JOB, vocab=20000, ring=1, ulysses=1)
    logits = 700 * job.vocab * 4
    weights = job.vocab * job.width * 4  # the head's gradient, and its sum
    (whole,) = pool.run(train_step, replace(job, loss_rows=None), world=1)
    (few,) = pool.run(train_step, job, world=1)
    assert whole.loss == pytest.approx(few.loss, rel=1e-6)
    assert whole.peak > 2 * logits
    assert few.peak - 3 * weights < logits / 2


def test_mlps_are_never_whole(pool: WorkerPool) -> None:
    """Gates and their gradients are four tensors of three times the hidden width; tiles leave little of them."""
    job = replace(JOB, width=128, ring=1, ulysses=1, mlp_rows=32)
    gates = 700 * 3 * job.width * 4
    (whole,) = pool.run(train_step, replace(job, mlp_rows=None), world=1)
    (tiles,) = pool.run(train_step, job, world=1)
    assert whole.loss == pytest.approx(tiles.loss, rel=1e-6)
    assert whole.peak - tiles.peak > 2 * gates
