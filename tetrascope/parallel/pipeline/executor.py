"""Runs this stage's part of any valid schedule.

Shapes come from the caller, who has them from the step plan: nothing is negotiated between the stages. A receive is
posted before it is needed, one ahead on every channel, and a send is not waited for, so that transfers run beside the
computation. A channel is what one stage sends another in one direction through the model; transfers carry no names,
the validator has proven that they come in the order in which they are wanted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.pipeline.actions import Kind, Schedule
from tetrascope.parallel.pipeline.placement import Placement
from tetrascope.parallel.pipeline.program import Instruction, program
from tetrascope.parallel.pipeline.recorder import Recorder
from tetrascope.parallel.tensor.linear import WeightGradient, put_off, split_backward

Payload = tuple[Tensor, ...]
"""What a chunk gives the next one: any tensors where both are on one stage, one of known shape where they are not."""

Compute = Callable[[int, int, Payload], tuple[Payload, Tensor | None]]
"""(chunk, micro-batch, what the chunk before gave) -> what the next chunk gets, and a loss born here, a scalar.

The last chunk gives an empty payload and the micro-batch's share of the loss. Any other chunk may have a loss too,
such as one that balances the load of experts; None where it has none.
"""

_Place = tuple[int, int]  # micro-batch, chunk
_Channel = tuple[bool, int]  # forward?, the other stage


class _Link:
    """Point-to-point transfers with other stages."""

    def __init__(
        self, instructions: Sequence[Instruction], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, mesh: Mesh
    ) -> None:
        self._mesh, self._shapes, self._dtype = mesh, shapes, dtype
        self._stage = mesh.index("pp")
        self._wanted: dict[_Channel, deque[int]] = defaultdict(deque)
        for one in instructions:
            if one.source is not None and one.source != self._stage:
                self._wanted[one.forward, one.source].append(one.action.micro_batch)
        self._posted: dict[_Channel, tuple[dist.Work | None, Tensor]] = {}
        self._in_flight: list[tuple[dist.Work, Tensor]] = []
        for channel in self._wanted:
            self._post(channel)

    def _post(self, channel: _Channel) -> None:
        """Posts the channel's next receive, if there is one."""
        if not self._wanted[channel]:
            return
        forward, source = channel
        shape = self._shapes[self._wanted[channel].popleft()]
        tensor = torch.empty(shape, dtype=self._dtype, device=self._mesh.device)
        group = self._mesh.channel(forward, rising=source < self._stage)
        self._posted[channel] = dist.irecv(tensor, self._mesh.stage_rank(source), group=group), tensor

    def receive(self, forward: bool, source: int) -> Tensor:
        """Waits for the channel's next tensor."""
        work, tensor = self._posted.pop((forward, source))
        if work is not None:
            work.wait()
        self._post((forward, source))
        return tensor

    def send(self, tensor: Tensor, forward: bool, target: int) -> None:
        """Posts a send; the tensor is kept until it has left."""
        self._in_flight = [(work, kept) for work, kept in self._in_flight if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        group = self._mesh.channel(forward, rising=target > self._stage)
        work = dist.isend(tensor, self._mesh.stage_rank(target), group=group)
        if work is not None:
            self._in_flight.append((work, tensor))

    def finish(self) -> None:
        """Waits for all sends."""
        for work, _ in self._in_flight:
            work.wait()
        self._in_flight.clear()


class _Stage:
    """A step of one stage: what it holds of every micro-batch between its actions."""

    def __init__(self, compute: Compute, link: _Link, mesh: Mesh) -> None:
        self._compute, self._link, self._mesh = compute, link, mesh
        self._stage = mesh.index("pp")
        self._alive: dict[_Place, tuple[Payload, Payload, Tensor | None]] = {}
        self._outputs: dict[_Place, Payload] = {}  # for the next chunk, on this stage
        self._gradients: dict[_Place, tuple[Tensor | None, ...]] = {}  # of a chunk's output, from this stage
        self._waiting: dict[_Place, list[WeightGradient]] = {}
        self.losses: dict[_Place, Tensor] = {}

    def fetch(self, one: Instruction) -> tuple[Tensor | None, ...]:
        """What an instruction needs from elsewhere: inputs of a forward, gradients of the outputs of a backward."""
        m, chunk = one.action.micro_batch, one.action.chunk
        if one.source is None:
            return ()
        if one.source != self._stage:
            tensor = self._link.receive(one.forward, one.source)
            return (tensor.requires_grad_(one.trained_before),) if one.forward else (tensor,)
        if not one.forward:
            return self._gradients.pop((m, chunk))
        given = self._outputs.pop((m, chunk - 1))
        return tuple(t.detach().requires_grad_(t.requires_grad and one.trained_before) for t in given)

    def run(self, one: Instruction, fetched: tuple[Tensor | None, ...]) -> None:
        """Does an instruction and hands on what it gives."""
        place = one.action.micro_batch, one.action.chunk
        if one.action.kind is Kind.FORWARD:
            self._forward(one, place, tuple(t for t in fetched if t is not None))
        elif one.action.kind is Kind.BACKWARD:
            self._backward(one, place, fetched)
        elif one.action.kind is Kind.BACKWARD_INPUT:
            with put_off(self._waiting.setdefault(place, [])):
                self._backward(one, place, fetched)
        else:
            for gradient in self._waiting.pop(place):
                gradient.compute()

    def _forward(self, one: Instruction, place: _Place, inputs: Payload) -> None:
        outputs, loss = self._compute(one.action.chunk, one.action.micro_batch, inputs)
        if loss is not None:
            self.losses[place] = loss.detach()
        if one.trained:
            self._alive[place] = inputs, outputs, loss
        if one.target == self._stage:
            self._outputs[place] = outputs
        elif one.target is not None:
            self._link.send(outputs[0], True, one.target)

    def _backward(self, one: Instruction, place: _Place, gradients: tuple[Tensor | None, ...]) -> None:
        inputs, outputs, loss = self._alive.pop(place)
        roots = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None]
        if loss is not None:
            roots.append((loss, torch.ones_like(loss)))
        # An output without a gradient, such as that of text where the adaptor alone is trained, gets one in vain.
        roots = [(out, grad) for out, grad in roots if out.requires_grad]
        if roots:
            torch.autograd.backward([out for out, _ in roots], [grad for _, grad in roots])
        m, chunk = place
        if one.target == self._stage:
            self._gradients[m, chunk - 1] = tuple(tensor.grad for tensor in inputs)
        elif one.target is not None:
            if inputs[0].grad is None:
                raise RuntimeError(
                    f"rank {self._mesh.rank}: no gradient for the input of micro-batch {m}, chunk {chunk}"
                )
            self._link.send(inputs[0].grad, False, one.target)


def connect(placement: Placement, mesh: Mesh) -> None:
    """Opens every channel between the stages, one after the other in an order that all ranks share.

    nccl makes the communicator of two ranks at their first transfer, and both wait there for each other; ranks that
    began with different channels would never meet. Gloo needs none of it. Every rank must call it.
    """
    stage, token = mesh.index("pp"), torch.zeros(1, device=mesh.device)
    for before, after in dict.fromkeys(pairwise(placement)):
        for forward, source, target in ((True, before, after), (False, after, before)):
            group = mesh.channel(forward, rising=target > source)
            if source != target and stage == source:
                dist.send(token, mesh.stage_rank(target), group=group)
            elif source != target and stage == target:
                dist.recv(token, mesh.stage_rank(source), group=group)


def execute(
    schedule: Schedule,
    compute: Compute,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    mesh: Mesh,
    recorder: Recorder | None = None,
) -> list[Tensor]:
    """Runs this stage's actions; gradients accumulate in the parameters.

    shapes: of the hidden states of every micro-batch where they cross from one stage to another, `(T/tp, H)`.
    recorder: is told when each action ran.

    Returns the losses that were born on this stage, detached scalars, by micro-batch and chunk.
    """
    instructions = program(schedule, mesh.index("pp"))
    link = _Link(instructions, shapes, dtype, mesh)
    stage = _Stage(compute, link, mesh)
    splits = any(one.action.kind is Kind.BACKWARD_WEIGHT for one in instructions)
    with split_backward() if splits else nullcontext():
        for one in instructions:
            asked = recorder.mark() if recorder else 0.0
            fetched = stage.fetch(one)
            start = recorder.mark() if recorder else 0.0
            stage.run(one, fetched)
            if recorder:
                recorder.add(one.action, asked, start, recorder.mark())
    link.finish()
    return [stage.losses[place] for place in sorted(stage.losses)]
