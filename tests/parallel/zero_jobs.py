"""What the ranks of the ZeRO tests do, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.zero.flat import GroupSpec
from tetrascope.parallel.zero.optimizer import ZeroAdamW

SHAPES = [(5, 3), (7,), (2, 2)]  # 26 elements: shares of unequal use for 4 ranks, one tensor over several shares


def gradients(step: int, rank: int) -> list[Tensor]:
    """A rank's gradient contributions in a step, the same wherever they are computed. Every other step has none for the
    last tensor, as a step without an image has none for a vision encoder."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [*found[:2], found[2] * (step % 2 == 0)]


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def zero_steps(
    steps: int, clip: float | None, dtype: torch.dtype, lr: float
) -> tuple[list[Tensor], list[float], Sequence[int]]:
    """Trains with ZeRO-1 over all ranks: parameters at the end, gradient norms, elements of state on this rank."""
    mesh = Mesh(Layout(dp=dist.get_world_size()), "cpu")
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    specs = [
        GroupSpec({"0": params[0], "2": params[2]}, 0.1, partial=False, tied=False, counted=True),
        GroupSpec({"1": params[1]}, 0.0, partial=False, tied=False, counted=True),
    ]
    optimizer = ZeroAdamW(specs, mesh, torch.device("cpu"), lr, (0.9, 0.95), 1e-8, clip)
    values = dict(zip("012", start(), strict=True))
    for group in optimizer.trained:
        whole = torch.cat([values[name].view(-1) for name in group.spans])
        mine = whole[group.start : group.start + group.share]
        group.master.data[: len(mine)] = mine
        group.publish()
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for param, grad in zip(params, gradients(step, mesh.rank), strict=True):
            for half in (grad.to(dtype) / 2,) * 2 if grad.any() else ():  # two micro-batches, or no backward at all
                (param * half).sum().backward()
        norm = optimizer.reduce()
        norms.append(norm.item())
        optimizer.step(lr, norm)
    sizes = [tensor.numel() for group in optimizer.groups for tensor in optimizer.state(group).values()]
    return [p.detach().clone() for p in params], norms, sizes
