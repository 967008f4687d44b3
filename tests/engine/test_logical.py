"""Which parts of which logical tensors a rank holds, and what fills them.

The oracle is counting: for parameters of random shapes, stacked of random pieces, divided and cut at random, the
shards of all ranks put back together must give every element of every logical tensor once, with its own value. One
that is missing would stay at its initial value after loading; one held twice would be saved from two places.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tetrascope.engine.logical import Shard, shards
from tetrascope.engine.source import fill, random_source
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.weights import HFTensor, Piece
from tetrascope.models.weights import whole as all_rows
from tetrascope.parallel.tensor.placement import Block, row_blocks, share, whole
from tetrascope.tools.verify.families.qwen2_vl import tiny_config

LocalPart = tuple[tuple[int, ...], tuple[Block, ...]]
"""Shape of a local parameter, and its place in the whole one."""


def random_pieces(rng: np.random.Generator) -> list[Piece]:
    """All rows of one to four tensors, in ranges and in any order: vectors, matrices, or one convolution kernel."""
    kind = rng.choice(["vector", "matrix", "kernel"])
    if kind == "kernel":
        return [all_rows("kernel", (int(rng.integers(1, 7)), *(int(n) for n in rng.integers(1, 4, 4))))]
    tail = () if kind == "vector" else (int(rng.integers(1, 9)),)
    tensors = [HFTensor(f"tensor{i}", (int(rng.integers(1, 10)), *tail)) for i in range(rng.integers(1, 5))]
    pieces = []
    for tensor in tensors:
        rows = tensor.shape[0]
        borders = sorted({0, rows, *rng.integers(0, rows + 1, rng.integers(0, 3)).tolist()})
        pieces += [Piece(tensor, start, stop - start) for start, stop in itertools.pairwise(borders)]
    return [pieces[i] for i in rng.permutation(len(pieces))] if rng.random() < 0.5 else pieces


def random_division(rng: np.random.Generator, pieces: list[Piece], parts: int) -> list[LocalPart]:
    """Every part's share: by rows of the pieces or of other segments, by columns, or not at all (one part)."""
    rows, tail = sum(p.rows for p in pieces), pieces[0].tensor.matrix[1:]
    kind = rng.choice(["pieces", "segments", "columns" if tail else "pieces", "whole"])
    if kind == "whole":
        return [((rows, *tail), whole((rows, *tail)))]
    if kind == "columns":
        cuts = [share(tail[0], parts, i) for i in range(parts)]
        return [((rows, len(c)), (Block(0, (0, c.start), (rows, len(c))),)) for c in cuts]
    segments = tuple(p.rows for p in pieces)
    if kind == "segments":
        borders = sorted(rng.integers(0, rows + 1, rng.integers(1, 4)).tolist())
        segments = tuple(int(n) for n in np.diff([0, *borders, rows]))
    divided = [row_blocks(segments, tail, parts, i) for i in range(parts)]
    return [((sum(b.size[0] for b in blocks), *tail), blocks) for blocks in divided]


def stacked(tensors: dict[str, Tensor], pieces: list[Piece]) -> Tensor:
    return torch.cat([tensors[p.tensor.name].reshape(p.tensor.matrix)[p.start : p.start + p.rows] for p in pieces])


def local_part(stack: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """The blocks cut out of the whole parameter, one below the other."""
    return torch.cat([stack[tuple(slice(s, s + n) for s, n in zip(b.start, b.size, strict=True))] for b in blocks])


def random_cuts(rng: np.random.Generator, total: int) -> list[tuple[int, int]]:
    borders = [0, *sorted(rng.integers(0, total + 1, rng.integers(0, 6)).tolist()), total]
    return list(itertools.pairwise(borders))


@pytest.mark.parametrize("seed", range(300))
def test_shards_hold_every_element_of_every_logical_tensor_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = random_pieces(rng)
    kinds = {p.tensor.name: p.tensor for p in pieces}
    tensors = {n: torch.from_numpy(rng.standard_normal(t.shape, dtype=np.float32)) for n, t in kinds.items()}
    stack = stacked(tensors, pieces)
    counts = {n: torch.zeros(t.matrix, dtype=torch.int64) for n, t in kinds.items()}
    for shape, blocks in random_division(rng, pieces, parts=int(rng.integers(1, 5))):
        local = local_part(stack, blocks)
        assert tuple(local.shape) == shape
        memory = local.reshape(-1).clone()
        for start, stop in random_cuts(rng, memory.numel()):
            run = memory[start:stop]
            for shard in shards(run, start, shape, blocks, pieces):
                logical = tensors[shard.name].reshape(shard.shape)
                place = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
                assert torch.equal(shard.tensor, logical[place])
                assert shard.tensor.numel()
                counts[shard.name][place] += 1
                shard.tensor.zero_()  # a view: what is written into a shard lands in the local memory
        assert not memory.any()
    assert all((count == 1).all() for count in counts.values())


def test_golden_shards_of_a_fused_projection() -> None:
    # q of 4 rows, k and v of 2, two columns each; the second of two ranks holds q2 q3 k1 v1; of its eight numbers,
    # the five from the fourth on: the second number of q3, then k1 and v1.
    pieces = [all_rows("q", (4, 2)), all_rows("k", (2, 2)), all_rows("v", (2, 2))]
    blocks = row_blocks((4, 2, 2), (2,), 2, 1)
    flat = torch.arange(3, 8)
    found = [(s.name, s.shape, s.offset, s.tensor.tolist()) for s in shards(flat, 3, (4, 2), blocks, pieces)]
    assert found == [
        ("q", (4, 2), (3, 1), [[3]]),
        ("k", (2, 2), (1, 0), [[4, 5]]),
        ("v", (2, 2), (1, 0), [[6, 7]]),
    ]


def test_an_empty_run_has_no_shards() -> None:
    assert shards(torch.empty(0), 4, (3, 4), whole((3, 4)), [all_rows("w", (3, 4))]) == []


def test_golden_shards_of_row_ranges() -> None:
    # A tensor fused by key/value head [q0 q1 k0 v0 | q2 q3 k1 v1], one row each, handled as [q0..q3 | k0 k1 | v0 v1];
    # the second of two ranks holds q2 q3 k1 v1, which lie apart in the parameter.
    fused = HFTensor("wqkv", (8, 3))
    pieces = [Piece(fused, 0, 2), Piece(fused, 4, 2), *(Piece(fused, row, 1) for row in (2, 6, 3, 7))]
    blocks = row_blocks((4, 2, 2), (3,), 2, 1)
    flat = torch.arange(12)
    found = [(s.shape, s.offset, s.tensor.tolist()) for s in shards(flat, 0, (4, 3), blocks, pieces)]
    assert found == [
        ((8, 3), (4, 0), [[0, 1, 2], [3, 4, 5]]),
        ((8, 3), (6, 0), [[6, 7, 8]]),
        ((8, 3), (7, 0), [[9, 10, 11]]),
    ]


def initial(name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    return FAMILY.initial(tiny_config(), name, shape)


@pytest.mark.parametrize("seed", range(20))
def test_random_numbers_do_not_depend_on_the_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = random_pieces(rng)
    stack = torch.empty(sum(p.rows for p in pieces), *pieces[0].tensor.matrix[1:])
    shape = tuple(stack.shape)
    fill(shards(stack.view(-1), 0, shape, whole(shape), pieces), random_source(7, initial))
    for local_shape, blocks in random_division(rng, pieces, parts=3):
        memory = torch.full(local_shape, float("nan")).view(-1)
        for start, stop in random_cuts(rng, memory.numel()):
            fill(shards(memory[start:stop], start, local_shape, blocks, pieces), random_source(7, initial))
        assert torch.equal(memory.view(local_shape), local_part(stack, blocks))


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return random_source(seed, initial)(Shard(name, shape, (0,) * len(shape), torch.empty(shape)))


def test_random_numbers_are_as_the_family_says() -> None:
    weight = drawn(0, "lm_head.weight", (200, 100))
    # 20,000 draws: mean and deviation within 5 standard errors of 0 and 0.02.
    assert abs(weight.mean().item()) < 5 * 0.02 / 20000**0.5
    assert abs(weight.std().item() - 0.02) < 5 * 0.02 / 40000**0.5
    assert drawn(0, "model.norm.weight", (5,)).tolist() == [1.0] * 5
    assert drawn(0, "visual.merger.ln_q.bias", (5,)).tolist() == [0.0] * 5


def test_names_and_seeds_have_numbers_of_their_own() -> None:
    first = drawn(0, "a.weight", (4, 4))
    assert torch.equal(first, drawn(0, "a.weight", (4, 4)))
    assert not torch.equal(first, drawn(0, "b.weight", (4, 4)))
    assert not torch.equal(first, drawn(1, "a.weight", (4, 4)))
