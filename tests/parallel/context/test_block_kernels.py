"""Kernels of blocks that run here, against fp64 formulas (kernel_checks.py); the registry; rows of blocks."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.context.kernel_checks import HEADS, RECTANGLES, SQUARES, check, expected, random_inputs
from tetrascope.errors import UserError
from tetrascope.parallel.context.attention.blocks import BlockSet, Rows
from tetrascope.parallel.context.attention.kernels import BLOCK_KERNELS, pick_block_kernel

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 3e-6)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("blocks", [SQUARES, RECTANGLES], ids=["causal", "full"])
@pytest.mark.parametrize("name", [name for name, k in BLOCK_KERNELS.items() if k.available(CPU, torch.float32)])
def test_kernels_follow_the_formula(
    name: str, blocks: BlockSet, heads: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    check(BLOCK_KERNELS[name], blocks, heads, dtype, bound)


@pytest.mark.parametrize("name", ["cpu-flash", "reference"])
def test_half_precision_comes_with_a_full_logsumexp(name: str) -> None:
    q, k, v, _ = random_inputs((4, 2), torch.bfloat16)
    out, lse = BLOCK_KERNELS[name].forward(q, k, v, SQUARES)
    expected_out, expected_lse = expected(q.double(), k.double(), v.double(), SQUARES)
    assert lse.dtype == torch.float32
    assert (lse - expected_lse).abs().max() <= 3e-6 and (out - expected_out).abs().max() <= 0.02


def test_registry() -> None:
    assert pick_block_kernel("auto", CPU, torch.float32) == ("cpu-flash", BLOCK_KERNELS["cpu-flash"])
    assert pick_block_kernel("reference", CPU, torch.float64)[0] == "reference"
    for name in ("varlen", "flash-attn-2", "flash-attn-3", "flash-attn-4", "transformer-engine"):
        with pytest.raises(UserError, match=rf"'{name}' cannot run on cpu with float32; .* auto, cpu-flash, reference"):
            pick_block_kernel(name, CPU, torch.float32)
    with pytest.raises(UserError, match=r"'flash9' is unknown"):
        pick_block_kernel("flash9", CPU, torch.float32)


def test_rows() -> None:
    x = torch.arange(12.0).view(6, 2)
    end_to_end, apart = Rows([(1, 2), (3, 1), (5, 0)]), Rows([(4, 2), (0, 1)])
    assert end_to_end.contiguous and not apart.contiguous
    assert end_to_end.take(x).data_ptr() == x[1].data_ptr() and end_to_end.take(x)[:, 0].tolist() == [2, 4, 6]
    assert apart.take(x)[:, 0].tolist() == [8, 10, 0] and apart.index(CPU) is apart.index(CPU)
    assert Rows([(0, 4), (4, 2)]).covers(6) and not end_to_end.covers(3) and not apart.covers(3)
    assert Rows([]).take(x).shape == (0, 2) and Rows([]).covers(0)
    apart.add(x, torch.ones(3, 2))
    end_to_end.put(x, torch.zeros(3, 2))
    assert x[:, 0].tolist() == [1, 0, 0, 0, 9, 11]
