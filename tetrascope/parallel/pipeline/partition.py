"""Which decoder layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tetrascope.errors import UserError


def balanced_split(layers: int, stages: int, first_extra: float, last_extra: float, first_least: int = 1) -> list[int]:
    """Layers per stage that minimise the heaviest stage, in units of one layer's cost.

    first_extra: cost of vision encoder and adaptor on stage 0; last_extra: cost of the output head on the last.
    first_least: layers that stage 0 gets at least. Every other stage gets at least one; among equally good splits, the
    one whose stages are most alike (smallest sum of squares). Raises UserError when there are too few layers.
    """
    check_layers(layers, stages, first_least)

    @cache
    def best(stage: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Heaviest stage, sum of squares and layer counts for stages `stage` … with `left` layers to give out."""
        extra = (first_extra if stage == 0 else 0.0) + (last_extra if stage == stages - 1 else 0.0)
        if stage == stages - 1:
            return left + extra, (left + extra) ** 2, (left,)
        options = []
        for count in range(first_least if stage == 0 else 1, left - (stages - 1 - stage) + 1):
            peak, squares, rest = best(stage + 1, left - count)
            options.append((max(count + extra, peak), squares + (count + extra) ** 2, (count, *rest)))
        return min(options)

    return list(best(0, layers)[2])


def check_layers(layers: int, stages: int, first_least: int = 1) -> None:
    """Raises UserError when there are too few decoder layers: one for each stage, `first_least` for the first."""
    needed = first_least + stages - 1
    if layers < needed:
        why = f", since the first stage must hold {first_least}" if first_least > 1 else ""
        raise UserError(
            f"parallel.pp: {stages} stages need at least {needed} decoder layers, the model has {layers}{why}; "
            f"lower parallel.pp to {layers - first_least + 1} or less"
        )


def check_split(split: Sequence[int], layers: int, stages: int, first_least: int = 1) -> None:
    """Raises UserError unless `split` has a layer for every one of `stages`, `first_least` for the first, and `layers`
    in total."""
    check_layers(layers, stages, first_least)
    if len(split) != stages or sum(split) != layers or min(split) < 1:
        raise UserError(
            f"parallel.split: {list(split)} must be {stages} numbers of at least 1 that add up to {layers} layers"
        )
    if split[0] < first_least:
        raise UserError(
            f"parallel.split: {list(split)} gives the first stage {split[0]} layers, this model needs at least "
            f"{first_least} there; raise the first number"
        )


def layer_ranges(split: Sequence[int]) -> list[range]:
    """Layer counts -> the layers of every stage."""
    starts = [sum(split[:stage]) for stage in range(len(split))]
    return [range(start, start + count) for start, count in zip(starts, split, strict=True)]
