"""Rotary position embedding.

The oracle is the definition with complex numbers (RoFormer, arXiv 2104.09864, eq. 13): feature i of the first half of
a head and feature i of its second half are one complex number, turned by position · θ^(−2i/D). It is computed here
number by number with Python's cmath, so that a sign, a pairing or a frequency that is wrong shows.
"""

from __future__ import annotations

import cmath

import pytest
import torch
from torch import Tensor

from tetrascope.models.layers.rotary import inverse_frequencies, multimodal_tables, rotate, tables_from_angles

THETA = 1e6


def turned(x_TND: Tensor, positions: list[list[int]], width: int, theta: float) -> Tensor:
    """`positions[row][i]` is the position that frequency i of a row takes; i counts over `width / 2` frequencies."""
    half = x_TND.shape[-1] // 2
    out = torch.empty_like(x_TND, dtype=torch.float64)
    for row in range(x_TND.shape[0]):
        for head in range(x_TND.shape[1]):
            for i in range(half):
                angle = positions[row][i] * theta ** (-2 * (i % (width // 2)) / width)
                first, second = x_TND[row, head, i].item(), x_TND[row, head, half + i].item()
                number = complex(first, second) * cmath.exp(1j * angle)
                out[row, head, i], out[row, head, half + i] = number.real, number.imag
    return out


def test_multimodal_rotary_is_a_turn_of_complex_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 16)
    positions = torch.tensor([[0, 1, 5, 90, 1000, 99999], [0, 3, 4, 70, 7, 12345], [2, 0, 9, 31, 50, 31000]])
    section = (2, 3, 3)
    axes = [0] * 2 + [1] * 3 + [2] * 3
    by_row = [[int(positions[axes[i], row]) for i in range(8)] for row in range(6)]
    out = rotate(x, multimodal_tables(positions, 16, THETA, section))
    # fp32 cosines and products of numbers below 4: a few 1e-7, at position 1e5 too (fp32 angles would be off by 2e-3).
    assert (out - turned(x, by_row, 16, THETA)).abs().max() <= 1e-6


def test_equal_axes_are_one_dimensional_rotary() -> None:
    # Text has t = h = w: the section must not matter, to the last bit.
    positions = torch.tensor([0, 1, 2, 17, 400])
    one_axis = tables_from_angles(positions.double()[:, None] * inverse_frequencies(16, THETA, positions.device))
    for section in ((2, 3, 3), (8, 0, 0), (0, 1, 7)):
        tables = multimodal_tables(positions.expand(3, -1), 16, THETA, section)
        assert torch.equal(tables.cos_TD, one_axis.cos_TD) and torch.equal(tables.sin_TD, one_axis.sin_TD)


def test_dot_products_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def product(at: int, to: int) -> float:
        tables = [multimodal_tables(torch.full((3, 1), p), 16, THETA, (2, 3, 3)) for p in (at, to)]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    assert product(12, 7) == pytest.approx(product(1012, 1007), abs=1e-5)
    assert abs(product(12, 7) - product(12, 8)) > 0.1


def test_low_precision_input_is_turned_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 16).bfloat16()
    tables = multimodal_tables(torch.arange(5).expand(3, -1), 16, THETA, (2, 3, 3))
    assert tables.cos_TD.dtype == torch.float32
    out = rotate(x, tables)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), tables).bfloat16())
