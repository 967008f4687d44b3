"""What all tests share: no network, one thread a process, one pool of processes for multi-rank tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch and transformers are imported: they read these once. The pool's processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tetrascope.tools.verify.pool import WorkerPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight processes for multi-rank jobs; they start at the first `pool.run`."""
    with WorkerPool(size=8) as pool:
        yield pool
