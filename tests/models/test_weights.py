"""Weight maps as data: cover, translation from one checkpoint layout to another, renaming, telling layouts apart.

The oracle of translations is numbers: parameters stacked as one map says, cut up as the other says, must be the other
checkpoint's tensors; a row taken from the wrong place has another number.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tetrascope.models.weights import (
    CheckpointLayout,
    HFTensor,
    Piece,
    WeightMap,
    check_cover,
    logical_tensors,
    relative,
    rename,
    renamed,
    renamed_layout,
    rows_of,
    whole,
)

FUSED = HFTensor("wqkv", (8, 3))
MAP: WeightMap = {
    "qkv": (Piece(FUSED, 0, 2), Piece(FUSED, 4, 2), *(Piece(FUSED, row, 1) for row in (2, 6, 3, 7))),
    "norm": (whole("norm.weight", (3,)),),
}


def test_the_tensors_of_a_map() -> None:
    assert logical_tensors(MAP) == {"wqkv": FUSED, "norm.weight": HFTensor("norm.weight", (3,))}
    with pytest.raises(ValueError, match=r"norm\.weight is both \(3,\) and \(4,\)"):
        logical_tensors({**MAP, "other": (whole("norm.weight", (4,)),)})


def test_views() -> None:
    assert HFTensor("kernel", (4, 3, 2, 2, 2)).matrix == (4, 24)
    assert whole("positions", (1, 5, 4), view=(5, 4)) == Piece(HFTensor("positions", (1, 5, 4), (5, 4)), 0, 5)
    with pytest.raises(ValueError, match=r"positions: shape \(1, 5, 4\) cannot be viewed as \(5, 5\)"):
        whole("positions", (1, 5, 4), view=(5, 5))


def test_every_row_has_one_parameter() -> None:
    check_cover(MAP)
    tied = whole("embedding", (5, 3))
    check_cover({"embed": (tied,), "head": (tied,)})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": (Piece(FUSED, 1, 2),)}, r"rows \[1, 2\) of wqkv belong to two parameters"),
        ({"a": (Piece(HFTensor("w", (4, 2)), 1, 3),)}, r"rows \[0, 1\) of w belong to no parameter"),
        ({"a": (Piece(HFTensor("w", (4, 2)), 0, 3),)}, r"rows \[3, 4\) of w belong to no parameter"),
        ({"a": (Piece(HFTensor("w", (4, 2)), 0, 5),)}, r"rows \[4, 5\) of w do not exist"),
        ({"a": (Piece(HFTensor("w", (4, 2)), 0, 4),) * 2}, r"rows \[0, 4\) of w belong to two parameters"),
    ],
)
def test_holes_and_overlaps_are_named(extra: WeightMap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cover({**MAP, **extra})


def test_rows_of_a_stack() -> None:
    a, b = HFTensor("a", (4, 1)), HFTensor("b", (3, 1))
    stack = (Piece(a, 1, 3), Piece(b, 0, 2))
    assert rows_of(stack, 0, 5) == stack
    assert rows_of(stack, 2, 2) == (Piece(a, 3, 1), Piece(b, 0, 1))
    assert rows_of(stack, 4, 1) == (Piece(b, 1, 1),)
    assert rows_of(stack, 2, 0) == ()


def random_map(rng: np.random.Generator, parameters: dict[str, int], prefix: str) -> WeightMap:
    """The rows of the parameters dealt to tensors in ranges and in any order, each row to one place."""
    ranges = []
    for name, rows in parameters.items():
        borders = sorted({0, rows, *rng.integers(0, rows + 1, 2).tolist()})
        ranges += [(name, start, stop - start) for start, stop in itertools.pairwise(borders)]
    order = rng.permutation(len(ranges))
    groups = [g for g in np.array_split(order, int(rng.integers(1, 4))) if len(g)]
    placed: dict[tuple[str, int], Piece] = {}
    for number, group in enumerate(groups):
        tensor = HFTensor(f"{prefix}{number}", (sum(ranges[i][2] for i in group), 2))
        row = 0
        for i in group:
            name, start, rows = ranges[i]
            placed[name, start] = Piece(tensor, row, rows)
            row += rows
    return {name: tuple(placed[key] for key in sorted(placed) if key[0] == name) for name in parameters}


def checkpoint(weights: WeightMap, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that hold these parameters."""
    tensors = {name: np.full(tensor.matrix, np.nan) for name, tensor in logical_tensors(weights).items()}
    for name, pieces in weights.items():
        row = 0
        for piece in pieces:
            tensors[piece.tensor.name][piece.start : piece.start + piece.rows] = parameters[name][
                row : row + piece.rows
            ]
            row += piece.rows
    return tensors


@pytest.mark.parametrize("seed", range(50))
def test_translation_between_layouts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parameters = {name: rng.standard_normal((int(rng.integers(1, 9)), 2)) for name in "abc"}
    sizes = {name: len(values) for name, values in parameters.items()}
    one, two = random_map(rng, sizes, "one"), random_map(rng, sizes, "two")
    check_cover(one)
    source, target = checkpoint(one, parameters), checkpoint(two, parameters)
    for name, pieces in relative(two, one).items():
        parts = [source[p.tensor.name][p.start : p.start + p.rows] for p in pieces]
        assert np.array_equal(np.concatenate(parts), target[name])


def test_translation_joins_neighbouring_rows() -> None:
    split: WeightMap = {"qkv": (whole("q", (4, 3)), whole("k", (2, 3)), whole("v", (2, 3))), "norm": MAP["norm"]}
    assert relative(MAP, MAP) == {name: (Piece(t, 0, t.shape[0]),) for name, t in logical_tensors(MAP).items()}
    assert relative(split, MAP)["q"] == (Piece(FUSED, 0, 2), Piece(FUSED, 4, 2))


def test_layouts_of_other_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"only one of the two has norm"):
        relative(MAP, {"qkv": MAP["qkv"]})
    with pytest.raises(ValueError, match="norm has other rows or columns"):
        relative(MAP, {**MAP, "norm": (whole("norm.weight", (4,)),)})
    with pytest.raises(ValueError, match="norm has other rows or columns"):
        relative(MAP, {**MAP, "norm": (whole("norm.weight", (3, 1)),)})


RULES = [(r"model\.", "language_model."), (r"(visual)\.", r"model.\1."), (r"visual", "never")]


def test_renaming() -> None:
    names = ["model.norm", "visual.norm", "a.model.norm", "lm_head"]
    assert [rename(n, RULES) for n in names] == ["language_model.norm", "model.visual.norm", "a.model.norm", "lm_head"]
    table: WeightMap = {
        "x": (whole("visual.w", (1, 1, 2), view=(1, 2)),),
        "y": (Piece(HFTensor("model.u", (4,)), 1, 2),),
    }
    assert renamed(table, RULES) == {
        "x": (whole("model.visual.w", (1, 1, 2), view=(1, 2)),),
        "y": (Piece(HFTensor("language_model.u", (4,)), 1, 2),),
    }


def no_files(config: Any, dtype: str) -> dict[str, dict[str, Any]]:
    return {}


def test_what_a_checkpoint_lacks_and_holds_besides() -> None:
    layout = CheckpointLayout(
        weights=lambda config: MAP,
        configs=no_files,
        ignored=(r"rotary\..*",),
        copies=lambda config: {"model.copy": "wqkv"},
    )
    assert layout.differences(None, ["wqkv", "norm.weight"]) == ([], [])
    assert layout.differences(None, ["wqkv", "norm.weight", "rotary.inv_freq", "model.copy"]) == ([], [])
    assert layout.differences(None, ["wqkv", "x.rotary.inv_freq", "b"]) == (["norm.weight"], ["b", "x.rotary.inv_freq"])
    other = renamed_layout(layout, [("model", "m"), ("wqkv", "fused")])
    assert other.differences(None, ["fused", "norm.weight", "m.copy"]) == ([], [])
    assert other.copies(None) == {"m.copy": "fused"}
