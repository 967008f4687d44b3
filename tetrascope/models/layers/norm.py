"""Root-mean-square norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · weight, with the statistics in fp32 and the product in x's dtype (arXiv 1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TH: Tensor) -> Tensor:
        x = x_TH.float()
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)  # x.square() is pow: slower
        return normed.to(x_TH.dtype) * self.weight
