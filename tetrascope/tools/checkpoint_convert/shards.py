"""Where tensor and pipeline parallelism would cut a model, from the family's sharding table alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from tetrascope.engine.logical import Shard, shards
from tetrascope.errors import UserError
from tetrascope.models.family import Family
from tetrascope.models.sharding import Column, Row, ShardingTable, Vocab, rule_for
from tetrascope.models.weights import Piece, logical_tensors
from tetrascope.parallel.tensor.placement import Block, row_blocks, share, whole


def parse_shards(text: str) -> tuple[int, int]:
    """`tp2pp2`, `tp2xpp2`, `tp4` or `pp3` -> degrees of tensor and pipeline parallelism. Raises UserError."""
    degrees = {"tp": 1, "pp": 1}
    parts = re.findall(r"(tp|pp)([1-9]\d*)", text.lower())
    if len(dict(parts)) < len(parts) or re.sub(r"(tp|pp)[1-9]\d*|[x×,]", "", text.lower()):
        raise UserError(f"--shards: {text!r} is no layout; give degrees of tp and pp, as in tp2pp2")
    degrees.update((axis, int(degree)) for axis, degree in parts)
    return degrees["tp"], degrees["pp"]


def whole_tensors(family: Family, config: object) -> list[list[Shard]]:
    """Every logical tensor as one shard, on the meta device."""
    tensors = logical_tensors(family.weights(config)).values()
    return [
        [Shard(t.name, t.matrix, (0,) * len(t.matrix), torch.empty(t.matrix, device="meta")) for t in tensors],
    ]


def shards_of_ranks(family: Family, config: object, tp: int, pp: int) -> list[list[Shard]]:
    """What each rank of a layout would save, stage by stage, on the meta device.

    The layers are divided evenly over the stages; tied parameters belong to the first. Raises UserError for more stages
    than layers.
    """
    layers = int(config.decoder.layers)  # type: ignore[attr-defined]
    if pp > layers:
        raise UserError(f"--shards: {pp} stages need as many layers, the model has {layers}")
    table, weights = family.sharding(config), family.weights(config)
    found: list[list[Shard]] = [[] for _ in range(tp * pp)]
    seen: set[tuple[Piece, ...]] = set()
    for name, pieces in weights.items():
        if pieces in seen:
            continue
        seen.add(pieces)
        shape = (sum(piece.rows for piece in pieces), *pieces[0].tensor.matrix[1:])
        stage = _stage_of(name, layers, pp)
        for rank, blocks in enumerate(_divided(table, name, shape, tp)):
            local = _local_shape(blocks)
            flat = torch.empty(int(torch.Size(local).numel()), device="meta")
            found[stage * tp + rank] += shards(flat, 0, local, blocks, pieces)
    return found


def _stage_of(name: str, layers: int, pp: int) -> int:
    """The stage that holds a parameter of the whole model."""
    if name.startswith("layers."):
        layer = int(name.split(".")[1])
        return next(stage for stage in range(pp) if layer in share(layers, pp, stage))
    return pp - 1 if name.startswith(("norm.", "head.")) else 0


def _divided(table: ShardingTable, name: str, shape: tuple[int, ...], tp: int) -> Iterator[tuple[Block, ...]]:
    """The blocks of a parameter that each tensor-parallel rank saves; of a replicated one only the first rank."""
    module, _, kind = name.rpartition(".")
    rule = rule_for(table, module)
    for rank in range(tp):
        if isinstance(rule, Column):
            yield row_blocks(rule.segments, shape[1:], tp, rank)
        elif isinstance(rule, Vocab):
            yield row_blocks((shape[0],), shape[1:], tp, rank)
        elif isinstance(rule, Row) and kind == "weight":
            columns = share(shape[1], tp, rank)
            yield (Block(0, (0, columns.start), (shape[0], len(columns))),)
        elif rank == 0:
            yield whole(shape)


def _local_shape(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    return (sum(block.size[0] for block in blocks), *blocks[0].size[1:])
