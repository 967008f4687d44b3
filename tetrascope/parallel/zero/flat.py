"""Parameters and gradients in flat buffers, each data-parallel rank owning one contiguous share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetrascope.parallel.primitives import all_gather, reduce_scatter


@dataclass(frozen=True)
class GroupSpec:
    """Parameters that are updated alike and whose gradients are reduced alike.

    weight_decay, lr_scale: of the optimizer, the latter as a multiple of the rate of the step. partial: replicated
    over tensor-parallel ranks, gradients to be summed over them. tied: a copy of the same parameters lives on another
    pipeline stage, gradients to be summed with it. counted: whether this rank's copy counts in the gradient norm (one
    copy of each parameter must). frozen: never updated and without gradients; all else then says nothing.
    """

    params: Mapping[str, nn.Parameter]
    weight_decay: float
    partial: bool
    tied: bool
    counted: bool
    lr_scale: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class Span:
    """A parameter's elements [start, stop) inside a flat buffer."""

    start: int
    stop: int
    shape: tuple[int, ...]


class FlatGroup:
    """One group's parameters in a flat buffer of their own dtype; this alone serves a frozen group.

    The parameters become views of `params`. `values` is this rank's share of them, which it loads and saves.
    """

    def __init__(self, spec: GroupSpec, data: dist.ProcessGroup, device: torch.device) -> None:
        self.spec = spec
        self.data = data
        self.spans: dict[str, Span] = {}
        total = 0
        for name, param in spec.params.items():
            self.spans[name] = Span(total, total + param.numel(), tuple(param.shape))
            total += param.numel()
        dtype = next(iter(spec.params.values())).dtype
        self.share = -(-total // data.size())  # rounded up: the last share may end in unused elements
        self.params = torch.zeros(self.share * data.size(), dtype=dtype, device=device)
        self.start = self.share * data.rank()
        self._own = self.params[self.start : self.start + self.share]
        for name, param in spec.params.items():
            span = self.spans[name]
            view = self.params[span.start : span.stop].view(span.shape)
            # The parameter object stays (modules hold it), its meta-device contents go.
            torch.utils.swap_tensors(param, nn.Parameter(view, requires_grad=not spec.frozen))

    @property
    def values(self) -> Tensor:
        """What this rank's share of the parameters is made from, `[share]`."""
        return self._own

    def publish(self) -> None:
        """Makes the parameters of all ranks equal to the values."""
        if self.data.size() > 1:
            all_gather(self.params, self._own.clone(), self.data)


class TrainedGroup(FlatGroup):
    """The flat buffers of a group that is trained.

    Gradients are accumulated in `grads` (fp32), whatever dtype the backward pass used. `master` is this rank's share
    of the parameters in fp32: a view when the parameters are fp32 themselves.
    """

    def __init__(self, spec: GroupSpec, data: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(spec, data, device)
        self.grads = torch.zeros(len(self.params), dtype=torch.float32, device=device)
        shared = self.params.dtype == torch.float32
        self.master = nn.Parameter(self._own if shared else torch.zeros(self.share, device=device))
        for name, param in spec.params.items():
            param.register_post_accumulate_grad_hook(self._accumulate(name))
        self._written: set[str] = set()

    @property
    def values(self) -> Tensor:
        return self.master.data

    def publish(self) -> None:
        if self.params.dtype != torch.float32:
            self._own.copy_(self.values)
        super().publish()

    def zero_grad(self) -> None:
        """Forgets the accumulated gradients. Their memory is written over by the next ones: zeroing it now, to add to
        it later, would be two passes more over all of it."""
        self._written.clear()

    def _accumulate(self, name: str) -> Any:
        span = self.spans[name]
        main = self.grads[span.start : span.stop].view(span.shape)

        def hook(param: Tensor) -> None:
            if param.grad is not None:
                main.add_(param.grad) if name in self._written else main.copy_(param.grad)
                self._written.add(name)
                param.grad = None

        return hook

    def reduce(self, tensor_parallel: dist.ProcessGroup, pipeline_ends: dist.ProcessGroup) -> None:
        """Sums the gradients over everybody who holds a part of them; this rank's share lands in `master.grad`."""
        for name in self.spans.keys() - self._written:  # no gradient reached them in this step
            self.grads[self.spans[name].start : self.spans[name].stop].zero_()
        if self.data.size() == 1:
            share = self.grads
        else:
            share = torch.empty(self.share, dtype=torch.float32, device=self.grads.device)
            reduce_scatter(share, self.grads, self.data)
        # Last the sums over those who hold the same parameters: one collective gives its result to all of them, so
        # that copies stay equal whatever order the data-parallel groups of each summed in.
        if self.spec.partial and tensor_parallel.size() > 1:
            dist.all_reduce(share, group=tensor_parallel)
        if self.spec.tied and pipeline_ends.size() > 1:
            dist.all_reduce(share, group=pipeline_ends)
        self.master.grad = share
