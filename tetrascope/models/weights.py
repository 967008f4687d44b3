"""The vocabulary of weight mappings: which rows of which checkpoint tensors a parameter is made of.

Every parameter of ours is a stack, along dimension 0, of row ranges of Hugging Face tensors, each tensor viewed as a
matrix (a convolution kernel `[E, 3, 2, 14, 14]` as `[E, 1176]`) or, when it has one dimension, as a vector. The names
and shapes of a family's *canonical* map are also the *logical tensors* that checkpoints hold: they do not depend on
any layout of the ranks. The same parameters may have other maps, for checkpoints whose tensors are named or fused
otherwise (`CheckpointLayout`); `relative` then says which rows of the one are which rows of the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a checkpoint: name and shape as on disk.

    A name with a slash, such as `llm/model.norm.weight`, lies in the folder of that name, without the prefix. `view`:
    the matrix or vector that it is handled as, where that is not its first dimension by all others, such as
    `(577, 1024)` for a position table of shape `(1, 577, 1024)`.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.view is not None and math.prod(self.view) != math.prod(self.shape):
            raise ValueError(f"{self.name}: shape {self.shape} cannot be viewed as {self.view}")

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape it is handled in: (rows, columns), or (rows,) for a vector."""
        if self.view is not None:
            return self.view
        return self.shape if len(self.shape) == 1 else (self.shape[0], math.prod(self.shape[1:]))


@dataclass(frozen=True)
class Piece:
    """The rows [start, start + rows) of a tensor, seen as matrix or vector."""

    tensor: HFTensor
    start: int
    rows: int


WeightMap = Mapping[str, tuple[Piece, ...]]
"""Parameter name of the whole, unsharded model -> the rows of checkpoint tensors stacked in it."""


def whole(name: str, shape: tuple[int, ...], view: tuple[int, ...] | None = None) -> Piece:
    """All rows of the tensor `name`."""
    tensor = HFTensor(name, shape, view)
    return Piece(tensor, 0, tensor.matrix[0])


def logical_tensors(weights: WeightMap) -> dict[str, HFTensor]:
    """The tensors that a map speaks of, by name, in the order of the map.

    Raises ValueError when it gives one name two shapes.
    """
    found: dict[str, HFTensor] = {}
    for piece in (piece for pieces in weights.values() for piece in pieces):
        tensor = found.setdefault(piece.tensor.name, piece.tensor)
        if tensor != piece.tensor:
            raise ValueError(f"weight map: {tensor.name} is both {tensor.shape} and {piece.tensor.shape}")
    return found


def check_cover(weights: WeightMap) -> None:
    """Raises ValueError unless every row of every tensor belongs to exactly one parameter.

    Tied parameters, those made of the same pieces, count once.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for piece in (piece for pieces in set(weights.values()) for piece in pieces):
        ranges.setdefault(piece.tensor.name, []).append((piece.start, piece.start + piece.rows))
    for name, tensor in logical_tensors(weights).items():
        row = 0
        for start, stop in sorted(ranges[name]):
            if start != row:
                problem = "belong to two parameters" if start < row else "belong to no parameter"
                raise ValueError(f"weight map: rows [{min(start, row)}, {max(start, row)}) of {name} {problem}")
            row = stop
        rows = tensor.matrix[0]
        if row != rows:
            problem = "do not exist" if row > rows else "belong to no parameter"
            raise ValueError(f"weight map: rows [{min(row, rows)}, {max(row, rows)}) of {name} {problem}")


def relative(of: WeightMap, to: WeightMap) -> WeightMap:
    """The tensors of one map as stacks of rows of the other's: two maps over the same parameters.

    `relative(canonical, other)` says where to read each canonical tensor in a checkpoint of the other layout,
    `relative(other, canonical)` how to put the other's tensors together. Raises ValueError when the maps do not have
    the same parameters in the same shapes.
    """
    if of.keys() != to.keys():
        odd = ", ".join(sorted(of.keys() ^ to.keys())[:3])
        raise ValueError(f"weight maps: only one of the two has {odd}")
    found: dict[str, dict[int, tuple[Piece, ...]]] = {name: {} for name in logical_tensors(of)}
    for parameter, pieces in of.items():
        target = to[parameter]
        sizes = [(sum(p.rows for p in ps), {p.tensor.matrix[1:] for p in ps}) for ps in (pieces, target)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"weight maps: {parameter} has other rows or columns in the other map: {sizes}")
        row = 0
        for piece in pieces:
            found[piece.tensor.name][piece.start] = rows_of(target, row, piece.rows)
            row += piece.rows
    return {name: _joined(p for start in sorted(parts) for p in parts[start]) for name, parts in found.items()}


def rows_of(pieces: Sequence[Piece], start: int, rows: int) -> tuple[Piece, ...]:
    """The rows [start, start + rows) of a stack of pieces, as pieces."""
    return tuple(piece for _, piece in cut_rows(pieces, start, rows))


def cut_rows(pieces: Sequence[Piece], start: int, rows: int) -> Iterator[tuple[int, Piece]]:
    """The rows [start, start + rows) of a stack of pieces: (row of the stack, part of a piece that begins there)."""
    row = 0
    for piece in pieces:
        low, high = max(start, row), min(start + rows, row + piece.rows)
        if low < high:
            yield low, Piece(piece.tensor, piece.start + low - row, high - low)
        row += piece.rows


def _joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Neighbours that are one range of one tensor become one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.tensor == piece.tensor and last.start + last.rows == piece.start:
            joined[-1] = replace(last, rows=last.rows + piece.rows)
        else:
            joined.append(piece)
    return tuple(joined)


RenamingRules = Sequence[tuple[str, str]]
"""(regular expression, replacement): the first that matches the beginning of a tensor's name replaces that part."""


def rename(name: str, rules: RenamingRules) -> str:
    """A tensor name under renaming rules; one that no rule matches stays."""
    for pattern, replacement in rules:
        new, hits = re.subn(rf"\A(?:{pattern})", replacement, name)
        if hits:
            return new
    return name


def renamed(weights: WeightMap, rules: RenamingRules) -> WeightMap:
    """The same map with tensors called otherwise."""
    return {
        parameter: tuple(replace(p, tensor=replace(p.tensor, name=rename(p.tensor.name, rules))) for p in pieces)
        for parameter, pieces in weights.items()
    }


def _no_copies(config: Any) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class CheckpointLayout:
    """How one kind of checkpoint of a family names and arranges the model's tensors."""

    weights: Callable[[Any], WeightMap]
    """Configuration -> its map, over the same parameters as the family's canonical one."""
    configs: Callable[[Any, str], Mapping[str, dict[str, Any]]]
    """Configuration and dtype name -> the JSON files that belong to it, path in the folder -> contents."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that may be there and are no parameters, such as rotary frequencies."""
    copies: Callable[[Any], Mapping[str, str]] = _no_copies
    """Configuration -> tensors that may be there and must then equal another one: a tied head's, the embedding."""
    language_folder: str = ""
    """Where tokenizer and generation_config.json lie, inside the checkpoint's folder."""

    def differences(self, config: Any, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Which tensors a checkpoint with these names lacks, and which it should not have."""
        present = set(names)
        expected = logical_tensors(self.weights(config)).keys()
        allowed = self.copies(config).keys()
        odd = [n for n in present - expected - allowed if not any(re.fullmatch(p, n) for p in self.ignored)]
        return sorted(expected - present), sorted(odd)


def single_config(to_hf: Callable[[Any, str], dict[str, Any]]) -> Callable[[Any, str], Mapping[str, dict[str, Any]]]:
    """`CheckpointLayout.configs` of the usual checkpoint: one config.json."""
    return lambda config, dtype: {"config.json": to_hf(config, dtype)}


def renamed_layout(layout: CheckpointLayout, rules: RenamingRules) -> CheckpointLayout:
    """A layout that differs in names only."""
    return replace(
        layout,
        weights=lambda config: renamed(layout.weights(config), rules),
        copies=lambda config: {rename(a, rules): rename(b, rules) for a, b in layout.copies(config).items()},
    )
