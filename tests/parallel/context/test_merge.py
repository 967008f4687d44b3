"""Merging of partial attention against the softmax over all keys at once, in fp64.

A mistake in the weights shows as an error of the size of the values, an overflow as nan. Gaps between the parts are
made by shifting the scores of one part: the softmax over all keys then sees nearly nothing, or only, that part.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tetrascope.parallel.context.attention.blocks import Rows
from tetrascope.parallel.context.attention.merge import Merged, merge


def part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1.0, -1.0, 20.0, -20.0, 88.0, -104.0, 1e4, -1e4])
def test_equals_softmax_over_all_keys(gap: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    values = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    scores[:, 4:] += gap
    a = [x.to(dtype) for x in part(scores[:, :4], values[:4])]
    b = [x.to(dtype) for x in part(scores[:, 4:], values[4:])]
    expected_out, expected_lse = part(scores, values)
    # Rounding of l is |gap|·eps, and the weight's relative error as much where it is not 0 or 1 (|gap| below 100).
    eps = torch.finfo(dtype).eps
    bound = 8 * eps * max(1.0, abs(gap) if abs(gap) < 200 else 1.0)
    for first, second in ((a, b), (b, a)):
        out, lse = (x.clone() for x in first)
        merge(out, lse, *second)
        assert (out - expected_out).abs().max() <= bound
        assert ((lse - expected_lse).abs() <= 4 * eps * expected_lse.abs().clamp(min=1)).all()


def test_parts_without_keys() -> None:
    """A part that saw no key changes nothing, on either side; two of them are one."""
    out, lse = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0])
    nothing, never = torch.zeros(1, 2), torch.tensor([-torch.inf])
    for first, second, expected in (
        ((out, lse), (nothing, never), (out, lse)),
        ((nothing, never), (out, lse), (out, lse)),
        ((nothing, never), (nothing, never), (nothing, never)),
    ):
        found = [x.clone() for x in first]
        merge(found[0], found[1], *second)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-1e4, 1e4)), min_size=1, max_size=6))
def test_any_number_of_parts(parts: list[tuple[int, float]]) -> None:
    generator = torch.Generator().manual_seed(len(parts))
    scores, values = zip(
        *(
            (
                torch.randn(3, keys, generator=generator, dtype=torch.float64) + shift,
                torch.randn(keys, 2, generator=generator, dtype=torch.float64),
            )
            for keys, shift in parts
        ),
        strict=True,
    )
    merged = Merged(torch.zeros(3, 1, 2, dtype=torch.float64))
    for s, v in zip(scores, values, strict=True):
        out, lse = part(s, v)
        merged.add(Rows([(0, 3)]), out.unsqueeze(1), lse.unsqueeze(1))
    out, lse = merged.result()
    expected_out, expected_lse = part(torch.cat(scores, 1), torch.cat(values))
    # 1e4 is stored to 2e-12, and weights change by as much
    torch.testing.assert_close(out[:, 0], expected_out, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse[:, 0], expected_lse, rtol=1e-14, atol=1e-10)


def test_half_precision_parts_are_summed_in_fp32() -> None:
    """64 equal keys with value 1 + i/64, one a part: the mean is 1.4921875. In bf16, each of 63 sums would be rounded
    to 2⁻⁸, which adds up to several 1e-3; parts themselves are exact here."""
    merged = Merged(torch.zeros(1, 1, 1, dtype=torch.bfloat16))
    for i in range(64):
        value = torch.tensor([[[1 + i / 64]]], dtype=torch.bfloat16)
        merged.add(Rows([(0, 1)]), value, torch.zeros(1, 1))
    assert merged.out is not None and merged.out.dtype == torch.float32
    assert merged.out.item() == pytest.approx(1.4921875, abs=1e-5)
    assert merged.result()[0].dtype == torch.bfloat16


def test_rows_that_no_part_reaches_are_zero() -> None:
    merged = Merged(torch.zeros(5, 1, 2))
    merged.add(Rows([(0, 1), (3, 1)]), torch.ones(2, 1, 2), torch.zeros(2, 1))
    out, lse = merged.result()
    assert out[:, 0, 0].tolist() == [1, 0, 0, 1, 0]
    assert lse[:, 0].tolist() == [0, -torch.inf, -torch.inf, 0, -torch.inf]
    out, lse = Merged(torch.zeros(2, 1, 2)).result()
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
