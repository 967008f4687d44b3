"""What the ranks of test_modules_parity.py do, by name."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.executor import _Link
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.layouts import Row
from tetrascope.tools.verify.run import run_layout


def gradients_sent(case: Case, layout: Layout, micro_batches: int) -> int:
    """How many gradients this rank sends to the stage before it."""
    kinds: list[bool] = []
    send = _Link.send

    def counted(self: _Link, tensor: Tensor, forward: bool, target: int) -> None:
        kinds.append(forward)
        send(self, tensor, forward, target)

    with mock.patch.object(_Link, "send", counted):
        run_layout(case, Row(layout, micro_batches, "1f1b"))
    return kinds.count(False)
