"""AdamW whose state is divided over the data-parallel ranks.

One step: gradients summed over tensor-parallel and tied copies where they are partial, reduce-scattered over the
data-parallel ranks, clipped by the norm over the whole model, each rank's share updated in fp32 by torch's fused
AdamW, parameters all-gathered. Frozen groups take no part in it: they have parameters and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.zero.flat import FlatGroup, GroupSpec, TrainedGroup

STATES = ("exp_avg", "exp_avg_sq")
"""Optimizer state tensors, each of the shape of the masters."""


class ZeroAdamW:
    """AdamW (arXiv 1711.05101) with ZeRO-1.

    groups: all of this rank's parameters. trained: those of them that are; none where all of a stage is frozen, which
    then still takes part in the collectives. steps: taken since the moments were zero, for the bias correction.
    """

    def __init__(
        self,
        specs: Sequence[GroupSpec],
        mesh: Mesh,
        device: torch.device,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        clip: float | None,
    ) -> None:
        self._mesh = mesh
        self._clip = clip
        self._device = device
        self.steps = 0
        self.groups = [
            (FlatGroup if spec.frozen else TrainedGroup)(spec, mesh.data, device) for spec in specs if spec.params
        ]
        self.trained = [group for group in self.groups if isinstance(group, TrainedGroup)]
        options = [{"params": [g.master], "weight_decay": g.spec.weight_decay} for g in self.trained]
        self._adam = torch.optim.AdamW(options, lr=lr, betas=betas, eps=eps, fused=True) if options else None

    def zero_grad(self) -> None:
        """Forgets the accumulated gradients."""
        for group in self.trained:
            group.zero_grad()

    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks; returns the norm over all that is trained, fp32 scalar.

        Afterwards `group.master.grad` holds this rank's share of the gradient of the whole batch.
        """
        squares = torch.zeros((), dtype=torch.float32, device=self._device)
        for group in self.trained:
            group.reduce(self._mesh.group("tp"), self._mesh.pipeline_ends)
            if group.spec.counted and group.master.grad is not None:
                squares += group.master.grad.square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    def step(self, lr: float, norm: Tensor) -> None:
        """Clips to the configured norm, updates the masters, publishes the parameters."""
        self.steps += 1
        if self._adam is None:
            return
        scale = None if self._clip is None else (self._clip / (norm + 1e-6)).clamp(max=1.0)
        for group, options in zip(self.trained, self._adam.param_groups, strict=True):
            options["lr"] = lr * group.spec.lr_scale
            if scale is not None and group.master.grad is not None:
                group.master.grad.mul_(scale)
        self._adam.step()
        for group in self.trained:
            group.publish()

    def state(self, group: FlatGroup) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of a group, fp32 `[share]`, made on demand so that they can be loaded into.

        Empty for a frozen group.
        """
        if self._adam is None or not isinstance(group, TrainedGroup):
            return {}
        state = self._adam.state[group.master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=group.master.device)
            for name in STATES:
                state[name] = torch.zeros_like(group.master.data)
        return {name: state[name] for name in STATES}

    def set_step(self, step: int) -> None:
        """Number of steps taken so far, after a resume."""
        self.steps = step
        for group in self.trained:
            self.state(group)
            if self._adam is not None:
                self._adam.state[group.master]["step"].fill_(step)
