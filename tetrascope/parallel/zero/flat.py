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

    weight_decay: of the optimizer. partial: replicated over tensor-parallel ranks, gradients to be summed
    over them. tied: a copy of the same parameters lives on another pipeline stage, gradients to be summed with it.
    counted: whether this rank's copy counts in the gradient norm (one copy of each parameter must).
    """

    params: Mapping[str, nn.Parameter]
    weight_decay: float
    partial: bool
    tied: bool
    counted: bool


@dataclass(frozen=True)
class Span:
    """A parameter's elements [start, stop) inside a flat buffer."""

    start: int
    stop: int
    shape: tuple[int, ...]


class FlatGroup:
    """The flat buffers of one group.

    The parameters become views of `params` (their own dtype); gradients are accumulated in `grads` (fp32), whatever
    dtype the backward pass used. `master` is this rank's share of the parameters in fp32: a view when the parameters
    are fp32 themselves.
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
        padded = self.share * data.size()
        self.params = torch.zeros(padded, dtype=dtype, device=device)
        self.grads = torch.zeros(padded, dtype=torch.float32, device=device)
        self.start = self.share * data.rank()
        self._own = slice(self.start, self.start + self.share)
        master = self.params[self._own] if dtype == torch.float32 else torch.zeros(self.share, device=device)
        self.master = nn.Parameter(master)
        for name, param in spec.params.items():
            span = self.spans[name]
            # The parameter object stays (modules hold it), its meta-device contents go.
            torch.utils.swap_tensors(param, nn.Parameter(self.params[span.start : span.stop].view(span.shape)))
            param.register_post_accumulate_grad_hook(self._accumulate(span))

    def _accumulate(self, span: Span) -> Any:
        main = self.grads[span.start : span.stop].view(span.shape)

        def hook(param: Tensor) -> None:
            if param.grad is not None:
                main.add_(param.grad)
                param.grad = None

        return hook

    def reduce(self, tensor_parallel: dist.ProcessGroup, pipeline_ends: dist.ProcessGroup) -> None:
        """Sums the gradients over everybody who holds a part of them; this rank's share lands in `master.grad`."""
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

    def publish(self) -> None:
        """Makes the parameters of all ranks equal to the masters."""
        own = self.params[self._own]
        if self.params.dtype != torch.float32:
            own.copy_(self.master.detach())
        if self.data.size() > 1:
            all_gather(self.params, own.clone(), self.data)
