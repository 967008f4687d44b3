"""What the ranks of test_modules_parity.py do, by name."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.executor import _Link
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.run import run_layout


def gradients_sent(case: Case, layout: Layout, micro_batches: int) -> int:
    """How many gradients this rank sends to the stage before it."""
    steps: list[int] = []
    send = _Link.send

    def counted(self: _Link, tensor: Tensor, step: int) -> None:
        steps.append(step)
        send(self, tensor, step)

    with mock.patch.object(_Link, "send", counted):
        run_layout(case, layout, micro_batches, "1f1b")
    return steps.count(-1)
