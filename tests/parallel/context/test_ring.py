"""The order of transfers and computation in the ring: what travels must be on its way before a block is computed.

A stand-in for the links notes when a transfer is posted and when it is waited for, one for the kernel when it runs. If
a transfer were posted only after the block before it, it could not hide behind it; the numbers would be the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.gathered import gathered_backward, gathered_forward
from tetrascope.parallel.context.attention.kernels import Reference
from tetrascope.parallel.context.attention.links import Arrival, Links
from tetrascope.parallel.context.attention.plan import AttentionPlan
from tetrascope.parallel.context.attention.ring import ring_backward, ring_forward
from tetrascope.parallel.context.tokens import shard_tokens


class Notes(Links):
    """Four ranks, of which this is one; what is sent comes back as it went."""

    def __init__(self) -> None:
        self.size, self.rank = 4, 1
        self.events: list[str] = []

    def _arrival(self, x: Tensor, kind: str) -> Arrival:
        name = kind.split()[1]
        self.events.append(f"post {name}")

        def wait() -> Tensor:
            self.events.append(f"wait {name}")
            return x

        return wait

    def pass_on(self, x: Tensor, kind: str) -> Arrival:
        return self._arrival(x, kind)

    def gather(self, x: Tensor, kind: str) -> Arrival:
        return self._arrival(x.expand(4, *x.shape), kind)

    def reduce_scatter(self, x: Tensor, kind: str) -> Tensor:
        return x[0]


class Noting(Reference):
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
        self.events.append("compute")
        return super().forward(q, k, v, blocks)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.events.append("compute")
        return super().backward(grad, q, k, v, out, lse, blocks)


@pytest.fixture
def setting() -> tuple[Notes, Noting, AttentionPlan, list[Tensor]]:
    links = Notes()
    sharding = shard_tokens([64, 32], 4, 1, chunk=0)
    tensors = [torch.randn(sharding.ring_rows, heads, 8) for heads in (4, 2, 2)]
    return links, Noting(links.events), AttentionPlan(sharding, 1), tensors


def test_ring(setting: tuple[Notes, Noting, AttentionPlan, list[Tensor]]) -> None:
    links, kernel, plan, (q, k, v) = setting
    out, lse = ring_forward(q, k, v, plan, True, links, kernel)
    step = ["wait kv", "post kv", "compute"]
    assert links.events == ["post kv", "compute", *step, *step, "wait kv", "compute"]
    links.events.clear()
    ring_backward(torch.ones_like(out), q, k, v, out, lse, plan, True, links, kernel)
    assert links.events == [
        *["post kv", "compute"],
        *["wait kv", "post kv", "compute", "post dkv"],  # nothing to wait for yet: the own share stays
        *["wait kv", "post kv", "compute", "wait dkv", "post dkv"],  # the sum travels while a block is computed
        *["wait kv", "compute", "wait dkv", "post dkv"],
        "wait dkv",
    ]


def test_gathered(setting: tuple[Notes, Noting, AttentionPlan, list[Tensor]]) -> None:
    """Own rows are computed while keys are gathered; then two kernel calls, whatever the degree."""
    links, kernel, plan, (q, k, v) = setting
    out, lse = gathered_forward(q, k, v, plan, True, links, kernel)
    assert links.events == ["post kv", "compute", "wait kv", "compute", "compute"]
    links.events.clear()
    gathered_backward(torch.ones_like(out), q, k, v, out, lse, plan, True, links, kernel)
    assert links.events == ["post kv", "compute", "wait kv", "compute", "compute"]
