"""What the tests of block kernels share: sets of blocks, and a kernel held to fp64 formulas.

The gradient's oracle is autograd through the softmax over all keys: a kernel is given output and logsumexp of the whole
and must return the share of one block, so that a kernel that used the block's own logsumexp would be far off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.kernels import BlockKernel
from tetrascope.parallel.context.tokens import Block

HEADS = [(2, 2), (4, 2), (3, 1)]

SQUARES = BlockSet((Block(0, 3, 1, 3, True), Block(4, 1, 0, 1, True), Block(5, 4, 5, 4, True)), True)
RECTANGLES = BlockSet((Block(0, 3, 0, 5, False), Block(4, 5, 6, 2, False)), False)


def random_inputs(heads: tuple[int, int], dtype: torch.dtype, rows: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(rows, heads[0], 8), (rows, heads[1], 8), (rows, heads[1], 8), (rows, heads[0], 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def scores(q: Tensor, k: Tensor, block: Block) -> Tensor:
    keys = k[block.k_start : block.k_start + block.k_rows].repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qnd,knd->qnk", q[block.q_start : block.q_start + block.q_rows], keys) / 8**0.5
    if block.causal:
        future = torch.ones(block.q_rows, block.k_rows, dtype=torch.bool).triu(1)
        found = found.masked_fill(future[:, None], -torch.inf)
    return found


def expected(q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for block in blocks.blocks:
        values = v[block.k_start : block.k_start + block.k_rows].repeat_interleave(q.shape[1] // k.shape[1], 1)
        found = scores(q, k, block)
        outs.append(torch.einsum("qnk,knd->qnd", found.softmax(-1), values))
        lses.append(found.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses)


def check(kernel: BlockKernel, blocks: BlockSet, heads: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    q, k, v, grad = random_inputs(heads, dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = kernel.forward(q, k, v, blocks)
    expected_out, expected_lse = expected(*exact, blocks)
    assert lse.dtype == dtype
    assert (out - expected_out).abs().max() <= bound and (lse - expected_lse).abs().max() <= bound

    # As if every query had, besides its block, one more key with score c and value w: the whole is then known, and the
    # block's share of the gradients is what autograd finds for q, k and v with c and w as constants.
    block_out, block_lse = expected_out, expected_lse
    other_lse, other_out = torch.full_like(block_lse, 1.5), torch.full_like(block_out, 0.7)
    whole_lse = torch.logaddexp(block_lse, other_lse)
    weight = (block_lse - whole_lse).exp().unsqueeze(-1)
    whole_out = weight * block_out + (1 - weight) * other_out
    expected_gradients = torch.autograd.grad((whole_out * blocks.q.take(grad.double())).sum(), exact)
    all_out, all_lse = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=dtype)
    blocks.q.put(all_out, whole_out.detach().to(dtype))
    blocks.q.put(all_lse, whole_lse.detach().to(dtype))
    found = kernel.backward(grad, q, k, v, all_out, all_lse, blocks)
    for ours, theirs, rows in zip(found, expected_gradients, (blocks.q, blocks.k, blocks.k), strict=True):
        scattered = torch.zeros_like(theirs)
        rows.add(scattered, ours)
        assert (scattered - theirs).abs().max() <= bound * max(1.0, theirs.abs().max().item())


def sequences(q: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> BlockSet:
    """What a packed kernel makes of its arguments: block i has rows cu_q[i] to cu_q[i + 1] of q."""
    borders = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q)
    return BlockSet(tuple(Block(a, b - a, c, d - c, causal) for a, b, c, d in borders), causal)
