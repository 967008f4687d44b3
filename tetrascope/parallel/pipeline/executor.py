"""Runs this stage's part of any valid schedule.

Shapes come from the caller, who has them from the step plan: nothing is negotiated between the stages. A receive is
posted before it is needed, one ahead on every channel, as soon as its sender waits for nothing more of this stage; a
send is not waited for. So transfers run beside the computation. A channel is what one stage sends another in one
direction through the model; transfers carry no names, the validator has proven that they come in the order in which
they are wanted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

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
        self._wanted: dict[_Channel, deque[Instruction]] = defaultdict(deque)
        for one in instructions:
            if one.source is not None and one.source != self._stage:
                self._wanted[one.forward, one.source].append(one)
        self._posted: dict[_Channel, tuple[dist.Work | None, Tensor]] = {}
        self._sent: dict[_Channel, deque[tuple[dist.Work | None, Tensor]]] = defaultdict(deque)
        self._gone: dict[_Channel, int] = defaultdict(int)
        self.post(0)

    def post(self, done: int) -> None:
        """Posts the next receive of every channel on which none is posted, if it is certain to come.

        done: how many instructions this stage has done. A receive that still depends on a later one is not posted: on a
        GPU it is a kernel that runs until it is answered, and whatever makes this process wait for the whole device
        before that instruction (memory given back, code loaded at its first use) would then wait for ever.
        """
        self._done = done
        for channel, wanted in self._wanted.items():
            if channel not in self._posted and wanted and wanted[0].after <= done:
                self._post(channel, wanted.popleft())

    def _post(self, channel: _Channel, one: Instruction) -> None:
        forward, source = channel
        tensor = torch.empty(self._shapes[one.action.micro_batch], dtype=self._dtype, device=self._mesh.device)
        group = self._mesh.channel(forward, rising=source < self._stage)
        self._posted[channel] = dist.irecv(tensor, self._mesh.stage_rank(source), group=group), tensor

    def receive(self, one: Instruction, source: int) -> Tensor:
        """Waits for what an instruction needs from another stage, the next tensor of its channel."""
        work, tensor = self._posted.pop((one.forward, source))
        if work is not None:
            work.wait()
        for forward, count in zip((False, True), one.taken, strict=True):
            self._let_go((forward, source), count)
        self.post(self._done)
        return tensor

    def send(self, tensor: Tensor, forward: bool, target: int) -> None:
        """Posts a send; the tensor is kept until it has left."""
        tensor = tensor.detach().contiguous()
        group = self._mesh.channel(forward, rising=target > self._stage)
        work = dist.isend(tensor, self._mesh.stage_rank(target), group=group)
        self._sent[forward, target].append((work, tensor))

    def _let_go(self, channel: _Channel, count: int) -> None:
        """Keeps no longer the first so many that a channel has sent. They have been received: nothing is waited for.

        Asking whether they have left would not do: gloo does not know before it is waited for, and a process that is
        ahead of its GPU would find all of them on their way.
        """
        while self._gone[channel] < count:
            work, _ = self._sent[channel].popleft()
            if work is not None:
                work.wait()
            self._gone[channel] += 1

    def finish(self) -> None:
        """Waits for all sends."""
        for channel, sent in self._sent.items():
            self._let_go(channel, self._gone[channel] + len(sent))


class _Stage:
    """A step of one stage: what it holds of every micro-batch between its actions."""

    def __init__(self, compute: Compute, link: _Link, mesh: Mesh) -> None:
        self._compute, self._link, self._mesh = compute, link, mesh
        self._stage = mesh.index("pp")
        self._alive: dict[_Place, tuple[Payload, tuple[GradientEdge | None, ...], GradientEdge | None]] = {}
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
            tensor = self._link.receive(one, one.source)
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
            # Where the backward begins, without the outputs themselves: no gradient needs their values.
            self._alive[place] = inputs, tuple(map(_edge, outputs)), None if loss is None else _edge(loss)
        if one.target == self._stage:
            self._outputs[place] = outputs
        elif one.target is not None:
            self._link.send(outputs[0], True, one.target)

    def _backward(self, one: Instruction, place: _Place, gradients: tuple[Tensor | None, ...]) -> None:
        inputs, outputs, loss = self._alive.pop(place)
        # An output without an edge, such as that of text where the adaptor alone is trained, gets a gradient in vain.
        given = zip(outputs, gradients, strict=True)
        roots = [(edge, grad) for edge, grad in given if edge is not None and grad is not None]
        if loss is not None:
            roots.append((loss, torch.ones_like(self.losses[place])))
        if roots:
            torch.autograd.backward([edge for edge, _ in roots], [grad for _, grad in roots])
        m, chunk = place
        if one.target == self._stage:
            self._gradients[m, chunk - 1] = tuple(tensor.grad for tensor in inputs)
        elif one.target is not None:
            if inputs[0].grad is None:
                raise RuntimeError(
                    f"rank {self._mesh.rank}: no gradient for the input of micro-batch {m}, chunk {chunk}"
                )
            self._link.send(inputs[0].grad, False, one.target)


def _edge(tensor: Tensor) -> GradientEdge | None:
    """A tensor's place in the graph; None where it is in none."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


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
        for done, one in enumerate(instructions, start=1):
            asked = recorder.mark() if recorder else 0.0
            fetched = stage.fetch(one)
            start = recorder.mark() if recorder else 0.0
            stage.run(one, fetched)
            link.post(done)
            if recorder:
                recorder.add(one.action, asked, start, recorder.mark())
    link.finish()
    return [stage.losses[place] for place in sorted(stage.losses)]
