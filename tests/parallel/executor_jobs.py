"""What the ranks of test_executor.py do, by name."""

from __future__ import annotations

import torch
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
