"""The exchange of features among 2, 4 and 8 gloo ranks against one process.

The oracle computes all features in one process, with plain autograd. Divided, the sum of the ranks' losses and the sum
of their gradients must be the same numbers. The known mistake would be a collective without a backward: only tokens
whose owner encoded them would then send gradients, and the encoder's would come out too small, at 8 ranks by most of
it. In fp64 the bound is rounding, 1e-12 relative to the largest gradient.
"""

from __future__ import annotations

import pytest
import torch

from tests.parallel.context.exchange_jobs import LAYERS, WIDTH, Case, divided, whole
from tetrascope.tools.verify.pool import WorkerPool

CASES = {
    "images": Case((4, 9, 2, 6, 1, 6), documents=(17, 40), first_visual=3, several=False),
    "weighted sums, newline": Case((4, 9, 2, 6, 1, 6), documents=(17, 40), first_visual=3, several=True),
    "one image": Case((12,), documents=(9, 30), first_visual=10, several=False),
    "one image of one token": Case((1,), documents=(33,), first_visual=32, several=False),
    "no image": Case((), documents=(20, 9), first_visual=0, several=False),
}
LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_gradients_and_bytes(pool: WorkerPool, case: Case, ring: int, ulysses: int) -> None:
    ranks = pool.run(divided, case, ring, ulysses, torch.float64, world=ring * ulysses)
    loss, grads, newline_grad = whole(case, torch.float64)
    torch.testing.assert_close(sum(rank[0] for rank in ranks), loss, rtol=1e-12, atol=1e-12)
    for i, expected in enumerate([*grads, newline_grad]):
        found = sum([*rank[1], rank[2]][i] for rank in ranks)
        scale = 0.0 if expected is None else expected.abs().max().item()
        zero = torch.zeros_like(found)
        torch.testing.assert_close(found, zero if expected is None else expected, rtol=0, atol=1e-12 * scale)
    # One collective each way for all feature tensors; in the backward what came in goes back.
    for _, _, _, sent, route in ranks:
        arrived = sum(route.receive_counts) - route.receive_counts[route.rank]
        assert sent == [route.bytes_sent(WIDTH, 8, LAYERS), arrived * WIDTH * 8 * LAYERS]


def test_gradients_come_from_other_ranks(pool: WorkerPool) -> None:
    """One image: a single rank encodes it, and gets gradients though all others hold tokens of it."""
    ranks = pool.run(divided, CASES["one image"], 4, 2, torch.float64, world=8)
    encoders = [route.rank for *_, route in ranks if sum(route.send_counts)]
    holders = [route.rank for *_, route in ranks if route.received]
    assert len(encoders) == 1 and len(holders) > 4
    for _, grads, _, _, route in ranks:
        assert all(grad.any() == (route.rank in encoders) for grad in grads)


def test_frozen_encoder_sends_no_gradients(pool: WorkerPool) -> None:
    case = CASES["weighted sums, newline"]
    ranks = pool.run(divided, case, 2, 2, torch.float64, False, world=4)
    loss, _, newline_grad = whole(case, torch.float64)
    torch.testing.assert_close(sum(rank[0] for rank in ranks), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(rank[2] for rank in ranks), newline_grad, rtol=1e-12, atol=1e-12)
    assert all(len(rank[3]) == 1 for rank in ranks)


def test_half_precision(pool: WorkerPool) -> None:
    """In bf16 the divided gradients are as far from fp64 as those of one process: at most three times its error, since
    each rank rounds sums over its own part of the tokens."""
    case = CASES["images"]
    exact, single = whole(case, torch.float64), whole(case, torch.bfloat16)
    ranks = pool.run(divided, case, 2, 2, torch.bfloat16, world=4)
    for i in range(LAYERS):
        error = (sum(rank[1][i].double() for rank in ranks) - exact[1][i]).abs().max()
        assert error <= 3 * (single[1][i].double() - exact[1][i]).abs().max()
