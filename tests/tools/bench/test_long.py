"""The counter of live bytes by hand, and the figures of the command on small sequences.

That more ranks need less memory each is the point of context parallelism; at this size chunk buffers would hide it, so
they are small. The bounds are those that docs/long-sequences.md reports for real lengths.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tetrascope.tools.bench.live_bytes import LiveBytes
from tetrascope.tools.bench.long import balances, main, random_packs
from tetrascope.tools.bench.long_jobs import Content, Job, train_step, unequal
from tetrascope.tools.verify.pool import WorkerPool


def test_live_bytes_by_hand() -> None:
    before = torch.ones(1000, requires_grad=True)
    with LiveBytes() as counted:
        assert counted.live == 0
        a = before * 2
        view = a.view(10, 100)
        assert counted.live == counted.peak == 4000
        b = a.exp()  # its backward keeps b
        del a
        assert counted.live == 8000  # the view holds a's storage
        del view
        assert counted.live == 4000
        out = b.sum()
        del b
        assert counted.live == 4004  # kept by autograd
        out.backward()
        del out
        assert counted.live == 4000  # the gradient of `before`
        torch.neg(before.detach(), out=torch.empty(1000))
    assert counted.live == 4000
    assert 8000 <= counted.peak <= 12008


def test_a_rank_among_more_needs_less(pool: WorkerPool) -> None:
    job = Job(unequal(8192, (5, 3, 2, 1), visual=True), 1, 1, loss_rows=32, mlp_rows=32)
    (one,) = pool.run(train_step, job, world=1)
    four = pool.run(train_step, replace(job, ring=4), world=4)
    assert sum(r.rows for r in four) == one.rows == 8192
    assert sum(r.patches for r in four) == one.patches
    assert four[0].loss == pytest.approx(one.loss, rel=1e-6)
    assert max(r.peak for r in four) * 4 < 1.15 * one.peak
    assert max(r.batch for r in four) * 4 < 1.15 * one.batch


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_attention_is_balanced_on_unequal_documents(ring: int) -> None:
    packs = random_packs(16384, 20)
    assert all(sum(lengths) == 16384 for lengths in packs)
    assert np.std([length for lengths in packs for length in lengths]) > 1000
    assert 1 < max(balances(packs, ring)) <= 1.02


def test_contents_have_the_tokens_asked_for() -> None:
    contents = unequal(65536, (5, 3, 2, 1), visual=True)
    assert sum(content.tokens for content in contents) == 65536
    assert 0.4 < sum(content.visual_tokens for content in contents) / 65536 <= 0.5
    assert Content(1024, 32, 254).visual_tokens == 262144


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["balance", "--tokens", "512", "--ranks", "2"]) == 0
    assert main(["memory", "--tokens", "256", "--ranks", "3", "--ulysses", "2"]) == 1
    assert "--ulysses: " in capsys.readouterr().err
