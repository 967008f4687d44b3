"""Attention kernels over packed sequences.

The oracle is the definition, written out below in fp64 for one query and one head at a time: it has no masks, no
permutation and no batching, so it cannot share a mistake with a kernel. A kernel that lets a query see the future or
another document, takes the wrong key head, or puts rows back in the wrong order is off by the size of the values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tetrascope.errors import UserError
from tetrascope.models.layers.attention import KERNELS, pick_attention
from tetrascope.models.layers.packed import Packed

# Of a tensor's largest element, where that is above 1. Two products of at most 9 terms and a softmax in fp32 (unit
# roundoff 6e-8) give up to 3e-7 in the output and, with the softmax's backward, whose terms cancel, 2.3e-6 in the
# gradients (largest of 20 seeds); a mistake is of the size of the values.
BOUND = 1e-5

LENGTHS = [
    (6,),
    (4, 4, 4),
    (1, 3, 5),  # sorted: no permutation
    (3, 7, 1, 7, 3),  # unsorted and repeated
    (9, 2, 5),
    (0, 4, 0, 2),
    (5, 0),
]
HEADS = [(2, 2), (4, 2), (3, 1)]  # query heads, key/value heads


def formula(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
    """softmax(q·kᵀ/√D)·v of every query and head on its own, fp64."""
    group = q_TND.shape[1] // k_TKD.shape[1]
    rows, start = [], 0
    for length in lengths:
        for query in range(start, start + length):
            stop = query + 1 if causal else start + length
            heads = []
            for head in range(q_TND.shape[1]):
                keys, values = k_TKD[start:stop, head // group], v_TKD[start:stop, head // group]
                exponents = torch.exp(keys @ q_TND[query, head] / q_TND.shape[2] ** 0.5)
                heads.append(exponents @ values / exponents.sum())
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= BOUND * max(1.0, largest)


def random_inputs(rows: int, heads: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, n, 8, generator=generator) for n in (heads[0], heads[1], heads[1]))
    return q, k, v


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_kernels_follow_the_formula_forward_and_backward(
    kernel: str, lengths: tuple[int, ...], heads: tuple[int, int], causal: bool
) -> None:
    inputs = [x.requires_grad_() for x in random_inputs(sum(lengths), heads)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = KERNELS[kernel](*inputs, Packed(lengths), causal=causal)
    expected = formula(exact[0], exact[1], exact[2], lengths, causal)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sdpa_equals_reference(lengths: tuple[int, ...], heads: tuple[int, int], causal: bool) -> None:
    # Both are held to the formula above; this one bounds what a change of kernel does to a run.
    inputs = [x.requires_grad_() for x in random_inputs(sum(lengths), heads)]
    outputs = [KERNELS[name](*inputs, Packed(lengths), causal=causal) for name in ("sdpa", "reference")]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    for ours, theirs in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert_close(ours, theirs)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(16,) * 64, (16, 12) * 32, (1,) * 700 + (2,) * 162])
def test_nothing_of_the_size_of_a_mask_over_the_pack_is_made(lengths: tuple[int, ...], causal: bool) -> None:
    """Many frames of a video: 1,024 rows or so. A mask over all of them would have a million elements."""
    q, k, v = (x.requires_grad_() for x in random_inputs(sum(lengths), (2, 2)))
    with Largest() as seen:
        KERNELS["sdpa"](q, k, v, Packed(lengths), causal=causal).sum().backward()
    assert q.numel() <= seen.elements <= 3 * q.numel()  # the three of query, key and value at most
    assert seen.elements < sum(lengths) ** 2 / 16


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_each_other(kernel: str, causal: bool) -> None:
    # Bit-equal, not close: whatever the kernel, what it computes for a document must not touch another's numbers.
    lengths, changed = (4, 6, 4, 2), slice(4, 10)
    before = random_inputs(16, (4, 2))
    after = tuple(x.clone() for x in before)
    for x, other in zip(after, random_inputs(16, (4, 2), seed=1), strict=True):
        x[changed] = other[changed]
    out = [KERNELS[kernel](*inputs, Packed(lengths), causal=causal) for inputs in (before, after)]
    kept = torch.ones(16, dtype=torch.bool)
    kept[changed] = False
    assert torch.equal(out[0][kept], out[1][kept])
    assert not torch.equal(out[0][changed], out[1][changed])


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_gradient_crosses_documents(kernel: str) -> None:
    inputs = [x.requires_grad_() for x in random_inputs(12, (4, 2))]
    out = KERNELS[kernel](*inputs, Packed((5, 3, 4)), causal=False)
    for gradient in torch.autograd.grad(out[5:8].sum(), inputs):
        assert gradient[:5].abs().max() == 0 and gradient[8:].abs().max() == 0
    assert gradient[5:8].abs().min() > 0  # of the values: what is zero is not zero for want of a graph


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_empty_pack(kernel: str, lengths: tuple[int, ...]) -> None:
    assert KERNELS[kernel](*random_inputs(0, (4, 2)), Packed(lengths), causal=True).shape == (0, 4, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dtype_is_kept(kernel: str) -> None:
    q, k, v = (x.bfloat16() for x in random_inputs(7, (4, 2)))
    out = KERNELS[kernel](q, k, v, Packed((5, 2)), causal=True)
    assert out.dtype == torch.bfloat16
    expected = formula(q.double(), k.double(), v.double(), (5, 2), True)
    assert (out - expected).abs().max() <= 0.02  # bf16 carries 8 bits: half an ulp of values below 4 is 0.008


def test_auto_picks_the_first_kernel_and_says_which() -> None:
    name, kernel = pick_attention("auto")
    assert name == next(iter(KERNELS)) == "sdpa"
    assert kernel is KERNELS["sdpa"]
    assert pick_attention("reference") == ("reference", KERNELS["reference"])


def test_unknown_kernel_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"kernels\.attention.*'flash9'.*auto, sdpa, reference"):
        pick_attention("flash9")
