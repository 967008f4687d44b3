"""What a rank is given as attention follows from the configuration."""

from __future__ import annotations

import pytest
import torch

from tetrascope.engine.attention import context_attention
from tetrascope.engine.config import KernelsSection
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.parallel.context.attention import ContextAttention
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.tools.verify.pool import WorkerPool


def chosen(layout: Layout, options: KernelsSection | None) -> tuple[str, str] | None:
    """Name of the block kernel's class and the exchange; None for the kernel of whole packs as it is."""
    attend = context_attention(sdpa_attention, Mesh(layout, "cpu"), torch.float32, options)
    return (type(attend.kernel).__name__, attend.exchange) if isinstance(attend, ContextAttention) else None


@pytest.mark.parametrize(
    ("layout", "options", "expected"),
    [
        (Layout(ring=2), None, ("CpuFlash", "ring")),
        (Layout(ulysses=2), KernelsSection(context="reference", exchange="gathered"), ("Reference", "gathered")),
        (Layout(dp=2), KernelsSection(context="reference"), None),
    ],
)
def test_attention_of_a_rank(
    pool: WorkerPool, layout: Layout, options: KernelsSection | None, expected: tuple[str, str] | None
) -> None:
    assert pool.run(chosen, layout, options, world=2) == [expected] * 2
