"""Runs this stage's part of any valid schedule.

Shapes come from the caller, who has them from the step plan: nothing is negotiated between the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.pipeline.actions import Action, Kind

Forward = Callable[[int, Tensor | None], Tensor]
"""Micro-batch number and the previous stage's output (None on the first stage) -> this stage's output.

The output of the last stage is the micro-batch's share of the loss, a scalar.
"""


class _Link:
    """Point-to-point transfers with the neighbouring stages: activations forward, their gradients backward."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._in_flight: list[tuple[dist.Work, Tensor]] = []

    def _group(self, step: int) -> dist.ProcessGroup:
        return self._mesh.group("pp") if step > 0 else self._mesh.pipeline_backward

    def send(self, tensor: Tensor, step: int) -> None:
        """Posts a send to the stage `step` further; the tensor is kept until it has left."""
        self._in_flight = [(work, kept) for work, kept in self._in_flight if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self._mesh.neighbour("pp", step), group=self._group(step))
        if work is not None:
            self._in_flight.append((work, tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, step: int) -> Tensor:
        """Waits for a tensor that travels in direction `step`, from the stage on the other side."""
        tensor = torch.empty(shape, dtype=dtype, device=self._mesh.device)
        work = dist.irecv(tensor, self._mesh.neighbour("pp", -step), group=self._group(step))
        if work is not None:
            work.wait()
        return tensor

    def finish(self) -> None:
        """Waits for all sends."""
        for work, _ in self._in_flight:
            work.wait()
        self._in_flight.clear()


def execute(
    actions: Sequence[Action],
    forward: Forward,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    mesh: Mesh,
    gradient_borders: tuple[bool, bool] = (True, True),
) -> list[Tensor]:
    """Runs the actions; gradients accumulate in the parameters.

    shapes: hidden-state shape of every micro-batch at the stage borders, `(T/tp, H)`. gradient_borders: whether
    gradients travel over the border before this stage and over the one after it; they do not where everything before
    is frozen. Neighbours must say the same of the border between them, for all micro-batches. One whose output needs
    no gradient all the same, such as text where the adaptor alone is trained, gets one and drops it.

    Returns the micro-batches' outputs on the last stage, detached, by number; an empty list on the others.
    """
    before, after = not mesh.first_stage and gradient_borders[0], not mesh.last_stage and gradient_borders[1]
    link = _Link(mesh)
    alive: dict[int, tuple[Tensor | None, Tensor]] = {}
    results: dict[int, Tensor] = {}
    for action in actions:
        m = action.micro_batch
        if action.kind is Kind.FORWARD:
            received = None
            if not mesh.first_stage:
                received = link.receive(shapes[m], dtype, +1).requires_grad_(before)
            output = forward(m, received)
            alive[m] = (received, output)
            if mesh.last_stage:
                results[m] = output.detach()
            else:
                link.send(output, +1)
        else:
            received, output = alive.pop(m)
            grad = link.receive(shapes[m], dtype, -1) if after else None
            if output.requires_grad:
                torch.autograd.backward(output, grad)
            if received is not None and before:
                if received.grad is None:
                    raise RuntimeError(f"rank {mesh.rank}: no gradient for the input of micro-batch {m}")
                link.send(received.grad, -1)
    link.finish()
    return [results[m] for m in sorted(results)]
