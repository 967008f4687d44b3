"""RMSNorm.

Two oracles: the formula x / sqrt(mean(x²) + eps) · weight in fp64, and, for where the rounding to bf16 happens (which
the formula leaves open, and which checkpoints were trained with), transformers' module, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from tetrascope.models.layers.norm import RMSNorm


def test_formula() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(24, eps=0.5), torch.randn(7, 24)
    torch.nn.init.normal_(norm.weight)
    exact = x.double() / torch.sqrt((x.double() ** 2).sum(-1, keepdim=True) / 24 + 0.5) * norm.weight.double()
    assert (norm(x) - exact).abs().max() <= 2e-6  # a sum of 24 squares and four roundings in fp32, values below 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(64, eps=1e-6), Qwen2VLRMSNorm(64, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = (torch.randn(50, 64) * 100).to(dtype)
    out = ours.to(dtype)(x)
    assert out.dtype == dtype
    assert torch.equal(out, theirs.to(dtype)(x))
