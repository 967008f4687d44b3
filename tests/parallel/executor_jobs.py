"""What the ranks of test_executor.py do, by name."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.actions import Schedule, placement_of
from tetrascope.parallel.pipeline.executor import Payload, connect, execute
from tetrascope.parallel.pipeline.recorder import Measured, Recorder
from tetrascope.parallel.tensor.linear import linear

WIDTH = 6


class Chunk(nn.Module):
    """Two linears with a norm between them, one of them deferrable, and a loss of its own (as of a router)."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 2)
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 2)
        self.scale = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(linear(x, self.first, self.bias)) * self.scale
        return x + hidden @ self.second.t(), hidden.square().mean() / 10


def rows(m: int) -> int:
    """Micro-batches are of unequal lengths."""
    return 3 + 2 * m


def data(m: int) -> Tensor:
    return torch.randn(rows(m), WIDTH, generator=torch.Generator().manual_seed(1000 + m))


def one_process(chunks: int, micro_batches: int, frozen: int) -> tuple[float, list[list[Tensor | None]]]:
    """Loss and gradients of all chunks, without a pipeline."""
    modules = make(chunks, frozen)
    total = 0.0
    for m in range(micro_batches):
        x, losses = data(m), []
        for module in modules:
            x, loss = module(x)
            losses.append(loss)
        losses.append(x.square().mean())
        torch.stack(losses).sum().backward()
        total += torch.stack(losses).sum().item()
    return total, [[p.grad for p in module.parameters()] for module in modules]


def make(chunks: int, frozen: int) -> list[Chunk]:
    modules = [Chunk(c) for c in range(chunks)]
    for module in modules[:frozen]:
        module.requires_grad_(False)
    return modules


def held(schedule: Schedule, micro_batches: int) -> tuple[list[int], list[int]]:
    """What other stages were sent and this one still has, at each of its computations: outputs, and gradients."""
    mesh, placement = Mesh(Layout(pp=len(schedule)), "cpu"), placement_of(schedule)
    modules = make(len(placement), 0)
    outputs: list[weakref.ref[object]] = []
    gradients: list[weakref.ref[object]] = []
    counts: tuple[list[int], list[int]] = ([], [])

    def compute(chunk: int, m: int, given: Payload) -> tuple[Payload, Tensor | None]:
        for found, kept in zip(counts, (outputs, gradients), strict=True):
            found.append(sum(one() is not None for one in kept))
        for x in given:
            x.register_post_accumulate_grad_hook(lambda t: gradients.append(weakref.ref(t.grad.untyped_storage())))
        out, loss = modules[chunk](given[0] if given else data(m))
        if chunk == len(placement) - 1:
            return (), loss + out.square().mean()
        outputs.append(weakref.ref(out.untyped_storage()))
        return (out,), loss

    execute(schedule, compute, [(rows(m), WIDTH) for m in range(micro_batches)], torch.float32, mesh)
    return counts


def frozen_inputs(schedule: Schedule, micro_batches: int, frozen: int) -> tuple[list[int], set[tuple[int, bool]]]:
    """How many inputs of chunks without a backward are still there at each later one; which chunks' inputs, by number,
    require a gradient."""
    mesh, placement = Mesh(Layout(pp=len(schedule)), "cpu"), placement_of(schedule)
    modules = make(len(placement), frozen)
    inputs: list[weakref.ref[object]] = []
    counts: list[int] = []
    learning: set[tuple[int, bool]] = set()

    def compute(chunk: int, m: int, given: Payload) -> tuple[Payload, Tensor | None]:
        if given and chunk < frozen:
            counts.append(sum(one() is not None for one in inputs))
            inputs.append(weakref.ref(given[0].untyped_storage()))
        learning.update((chunk, x.requires_grad) for x in given)
        out, loss = modules[chunk](given[0] if given else data(m))
        return ((), loss + out.square().mean()) if chunk == len(placement) - 1 else ((out,), loss)

    execute(schedule, compute, [(rows(m), WIDTH) for m in range(micro_batches)], torch.float32, mesh)
    return counts, learning


def posted(schedule: Schedule, micro_batches: int) -> list[int]:
    """How many of its forwards this stage had done when it posted each receive."""
    mesh, placement = Mesh(Layout(pp=len(schedule)), "cpu"), placement_of(schedule)
    modules = make(len(placement), 0)
    forwards: list[int] = []
    found: list[int] = []
    real = dist.irecv

    def irecv(*args: Any, **kwargs: Any) -> Any:
        found.append(len(forwards))
        return real(*args, **kwargs)

    def compute(chunk: int, m: int, given: Payload) -> tuple[Payload, Tensor | None]:
        forwards.append(m)
        out, loss = modules[chunk](given[0] if given else data(m))
        return ((), loss + out.square().mean()) if chunk == len(placement) - 1 else ((out,), loss)

    with mock.patch.object(dist, "irecv", irecv):
        execute(schedule, compute, [(rows(m), WIDTH) for m in range(micro_batches)], torch.float32, mesh)
    return found


def pipeline(
    schedule: Schedule, micro_batches: int, frozen: int, record: bool = False
) -> tuple[list[float], dict[int, list[Tensor | None]], list[Measured]]:
    """This stage's losses, the gradients of its chunks, and when its actions ran."""
    mesh = Mesh(Layout(pp=len(schedule)), "cpu")
    placement = placement_of(schedule)
    connect(placement, mesh)
    modules = make(len(placement), frozen)
    recorder = Recorder(torch.device("cpu")) if record else None

    def compute(chunk: int, m: int, given: Payload) -> tuple[Payload, Tensor | None]:
        out, loss = modules[chunk](given[0] if chunk else data(m))
        if chunk < len(placement) - 1:
            return (out,), loss
        return (), loss + out.square().mean()

    shapes = [(rows(m), WIDTH) for m in range(micro_batches)]
    losses = execute(schedule, compute, shapes, torch.float32, mesh, recorder)
    here = [c for c, stage in enumerate(placement) if stage == mesh.index("pp")]
    gradients = {c: [p.grad for p in modules[c].parameters()] for c in here}
    return [loss.item() for loss in losses], gradients, recorder.spans if recorder else []
