"""Rotary position embedding: tables computed once a step, shared by all layers.

Angles are taken in fp64 and only their cosines and sines are rounded to fp32: an fp32 angle is already off by
2.5e-3 rad at position 1e5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin, fp32 `[T, D]` each, D the head width; both halves of D hold the same angles."""

    cos_TD: Tensor
    sin_TD: Tensor


def inverse_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """θ^(−2i/width), i = 0 … width/2−1, fp64 `[width/2]` (RoFormer, arXiv 2104.09864, eq. 15)."""
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def tables_from_angles(angles_TF: Tensor) -> RotaryTables:
    """Tables for the angles of one half head, fp64 `[T, D/2]`, repeated for the other half."""
    angles_TD = torch.cat((angles_TF, angles_TF), dim=-1)
    return RotaryTables(angles_TD.cos().float(), angles_TD.sin().float())


def multimodal_tables(positions_3T: Tensor, head_dim: int, theta: float, section: tuple[int, ...]) -> RotaryTables:
    """M-RoPE tables: `section` = how many frequencies take the temporal, height and width position (in that order).

    Qwen2-VL, arXiv 2409.12191 §2.1. positions int64 `[3, T]`; sum(section) = head_dim/2.
    """
    axis_of_frequency = torch.repeat_interleave(
        torch.arange(3, device=positions_3T.device), torch.tensor(section, device=positions_3T.device)
    )
    frequencies_F = inverse_frequencies(head_dim, theta, positions_3T.device)
    return tables_from_angles(positions_3T[axis_of_frequency].T.double() * frequencies_F)


POSITION_UNIT = 256
"""One-dimensional positions are integers in units of 1/256 of a token, so that V2PE's fractions are exact."""


def linear_tables(positions_1T: Tensor, head_dim: int, theta: float) -> RotaryTables:
    """Plain rotary tables for positions int64 `[1, T]` in units of 1/256 of a token (V2PE, arXiv 2412.09616)."""
    frequencies_F = inverse_frequencies(head_dim, theta, positions_1T.device)
    return tables_from_angles((positions_1T[0].double() / POSITION_UNIT)[:, None] * frequencies_F)


def interleaved_tables(positions_3T: Tensor, head_dim: int, theta: float, section: tuple[int, ...]) -> RotaryTables:
    """M-RoPE tables of Qwen3-VL: axes take turns over the frequencies.

    Frequency f turns with the height if f mod 3 is 1 and f < 3·section[1], with the width if f mod 3 is 2 and
    f < 3·section[2], otherwise with the time (transformers, qwen3_vl/modeling_qwen3_vl.py). positions int64 `[3, T]`.
    """
    axis_of_frequency = torch.zeros(head_dim // 2, dtype=torch.int64, device=positions_3T.device)
    for axis in (1, 2):
        axis_of_frequency[axis : 3 * section[axis] : 3] = axis
    frequencies_F = inverse_frequencies(head_dim, theta, positions_3T.device)
    return tables_from_angles(positions_3T[axis_of_frequency].T.double() * frequencies_F)


AXIAL_THETA = 10000.0
"""The base of the vision encoders' rotary positions."""


def axial_tables(positions_2N: Tensor, head_dim: int) -> RotaryTables:
    """2D rotary tables of vision encoders: half of the frequencies turn with a patch's row, half with its column.

    positions int64 `[2, N]`. Source: transformers, qwen2_vl/modeling_qwen2_vl.py (`Qwen2VLVisionRotaryEmbedding`).
    """
    frequencies_F = inverse_frequencies(head_dim // 2, AXIAL_THETA, positions_2N.device)
    angles = positions_2N.double()[..., None] * frequencies_F  # [2, N, D/4]
    return tables_from_angles(torch.cat((angles[0], angles[1]), dim=-1))


def rotate(x_TND: Tensor, tables: RotaryTables) -> Tensor:
    """x·cos + rotate_half(x)·sin in fp32, returned in x's dtype; the same rotation for every head."""
    x = x_TND.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * tables.cos_TD[:, None] + turned * tables.sin_TD[:, None]).to(x_TND.dtype)
