"""Bytes that context parallelism sends, counted and by formula: python -m tetrascope.tools.bench.context_bytes

One attention layer, forward and backward, and the exchange of visual features, on 2, 4 and 8 ranks of the CPU. Counted
where tensors enter torch's collectives; the same on every machine. Rows are of L tokens, all documents cut; d and d_kv:
elements of a row of queries and of keys, key heads repeated where Ulysses needs it; e: bytes of an element.

    Ulysses, U ranks     (U-1)/U · L/P · (2d + 2d_kv) · e        the same back
    ring, R ranks        (R-1) · L/P · 2d_kv · e                 the same back, and (R-1) · L/P · 2d_kv · 4 for dK, dV
    gathered, R ranks    as the ring

The usual ring lets dK and dV travel R times (`published`): here what a rank adds to its own keys stays at home.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import lcm

import numpy as np
import torch

from tetrascope.tools.bench.bytes_jobs import (
    Layer,
    Mode,
    Pictures,
    attention_bytes,
    divide_pictures,
    picture_bytes,
)
from tetrascope.tools.verify.pool import WorkerPool

LAYER = Layer(documents=(640, 384), heads=16, kv_heads=4, width=16, dtype="bfloat16")
PICTURES = Pictures(frames=24, tokens=16, first=100, width=256)
RANKS = (2, 4, 8)


def modes_of(ranks: int) -> list[Mode]:
    """The ways of attention on so many ranks."""
    both = [Mode(ranks // 2, 2)] if ranks > 2 else []
    return [Mode(ranks, 1), Mode(ranks, 1, "gathered"), Mode(1, ranks), *both]


def name_of(mode: Mode) -> str:
    way = f"{'ring' if mode.exchange == 'ring' else 'gathered'} {mode.ring}" if mode.ring > 1 else ""
    return " × ".join(part for part in (way, f"Ulysses {mode.ulysses}" if mode.ulysses > 1 else "") if part)


def formula(layer: Layer, mode: Mode, hops: int) -> tuple[int, int]:
    """Bytes of a rank in forward and backward; hops: how often dK and dV travel."""
    size = getattr(torch, layer.dtype).itemsize
    rows = layer.rows // mode.ranks
    d, d_kv = layer.heads * layer.width, lcm(layer.kv_heads, mode.ulysses) * layer.width
    all_to_all = (mode.ulysses - 1) * rows * (2 * d + 2 * d_kv) * size // mode.ulysses
    # In the ring a rank has the rows of its Ulysses group and its share of their heads: L/P · 2·d_kv elements again.
    once = rows * 2 * d_kv
    forward = all_to_all + (mode.ring - 1) * once * size
    return forward, forward + hops * once * 4


def attention_table(layer: Layer, pool: WorkerPool) -> list[str]:
    """Markdown, a row for each mode and number of ranks. Raises ValueError when ranks do not send alike."""
    lines = [
        "| ranks | attention | forward, counted | formula | backward, counted | formula | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        modes = modes_of(ranks)
        for mode, of_ranks in zip(
            modes, zip(*pool.run(attention_bytes, layer, modes, world=ranks), strict=True), strict=True
        ):
            if len(set(of_ranks)) > 1:
                raise ValueError(f"{mode}: ranks send {sorted(set(of_ranks))} bytes")
            (forward, backward), ours = of_ranks[0], formula(layer, mode, mode.ring - 1)
            published = formula(layer, mode, mode.ring if mode.ring > 1 and mode.exchange == "ring" else mode.ring - 1)
            cells = [forward, ours[0], backward, ours[1], published[1]]
            lines.append(f"| {ranks} | {name_of(mode)} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return lines


def picture_formula(layer: Layer, pictures: Pictures, mode: Mode) -> list[tuple[int, int]]:
    """Bytes of every rank in forward and backward: a feature for each of its tokens that another rank owns."""
    sharding, visual, _ = divide_pictures(layer, pictures, mode)
    size = pictures.width * getattr(torch, layer.dtype).itemsize
    encoder = np.repeat(visual.rank_of, pictures.tokens)
    owner = sharding.inverse[pictures.first + np.arange(len(encoder))] // sharding.rank_rows
    leaves = encoder != owner
    return [
        (int((leaves & (encoder == rank)).sum()) * size, int((leaves & (owner == rank)).sum()) * size)
        for rank in range(mode.ranks)
    ]


def picture_table(layer: Layer, pictures: Pictures, pool: WorkerPool) -> list[str]:
    """Markdown, a row for each division: bytes of the rank that sends most."""
    lines = [
        "| ranks | division | forward, counted | formula | backward, counted | formula | an all-gather would |",
        "|---|---|---|---|---|---|---|",
    ]
    total = pictures.frames * pictures.tokens * pictures.width * getattr(torch, layer.dtype).itemsize
    for ranks in RANKS:
        modes = [mode for mode in modes_of(ranks) if mode.exchange == "ring"]
        counted = zip(*pool.run(picture_bytes, layer, pictures, modes, world=ranks), strict=True)
        for mode, of_ranks in zip(modes, counted, strict=True):
            expected = picture_formula(layer, pictures, mode)
            cells = [max(column) for side in (0, 1) for column in _columns(of_ranks, expected, side)]
            cells.append(total // ranks * (ranks - 1))
            lines.append(f"| {ranks} | {name_of(mode)} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return lines


def _columns(
    counted: Sequence[tuple[int, int]], expected: Sequence[tuple[int, int]], side: int
) -> tuple[list[int], list[int]]:
    return [rank[side] for rank in counted], [rank[side] for rank in expected]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m tetrascope.tools.bench.context_bytes", description=__doc__).parse_args(
        arguments
    )
    with WorkerPool(size=max(RANKS)) as pool:
        print(f"{LAYER}\n")
        print("\n".join(attention_table(LAYER, pool)))
        print(f"\n{PICTURES}\n")
        print("\n".join(picture_table(LAYER, PICTURES, pool)))


if __name__ == "__main__":
    main()
