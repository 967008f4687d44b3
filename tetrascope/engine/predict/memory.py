"""What a rank holds from step to step, by formula: parameters, fp32 gradients, its share of the optimizer's state.

The same figures as building the stage gives (`engine/dryrun.py`), without a process group: the shapes of the whole
model's parameters, the tensor-parallel rule of each, and the flat buffers of `parallel/zero/flat.py`, whose shares are
rounded up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tetrascope.engine.modules import ModuleOptions
from tetrascope.models.sharding import Column, Row, Rule, ShardingTable, Vocab, rule_for
from tetrascope.models.weights import WeightMap
from tetrascope.parallel.tensor.placement import share

FP32 = 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage. state: masters (where parameters are not fp32 themselves) and moments.
    workspace: what is needed for a moment, beside activations. replicated, tied: of the gradients' share of this rank,
    what is summed over the tensor-parallel group, and with the other end of the pipeline."""

    weight_bytes: float
    gradient_bytes: float
    state_bytes: float
    workspace_bytes: float = 0.0
    replicated: float = 0.0
    tied: float = 0.0

    @property
    def static(self) -> float:
        """Held all the time."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes


class Alike(NamedTuple):
    """What parameters of one flat buffer have in common (`StageModel.group_specs`)."""

    tied: bool
    frozen: bool
    replicated: bool
    weight_decay: float
    lr: float


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: `vision`, `adaptor`, `embed`, `layers.0` …, `norm`, `head`."""
    first, _, rest = name.partition(".")
    return f"layers.{rest.partition('.')[0]}" if first == "layers" else first


class Sizes:
    """Elements that the first tensor-parallel rank holds of every part of a model.

    tied: whether embedding and head are one parameter.
    """

    def __init__(
        self,
        weights: WeightMap,
        table: ShardingTable,
        modules: Mapping[str, ModuleOptions],
        tied: bool,
        tp: int,
    ) -> None:
        self._tied = tied
        self.parts: dict[str, Counter[Alike]] = {}
        for name, pieces in weights.items():
            shape = (sum(piece.rows for piece in pieces), *pieces[0].tensor.matrix[1:])
            module, _, key = name.rpartition(".")
            elements, replicated = _local(rule_for(table, module), key, shape, tp)
            own = modules[name]
            decay = own.weight_decay if len(shape) > 1 else 0.0
            options = (0.0, 0.0) if own.frozen else (decay, own.lr)
            alike = Alike(False, own.frozen, replicated, *options)
            self.parts.setdefault(part_of(name), Counter())[alike] += elements

    def trained(self, part: str) -> int:
        """Trained elements of a part."""
        return sum(n for alike, n in self.parts.get(part, {}).items() if not alike.frozen)

    def stage(self, parts: Sequence[str], data: int, item: int) -> StageMemory:
        """A stage that holds these parts, its state divided over `data` ranks; item: bytes of a parameter."""
        groups = self._groups(set(parts))
        shares = {alike: -(-n // data) for alike, n in groups.items() if n}
        grown = {alike: n for alike, n in shares.items() if not alike.frozen}
        masters = FP32 if item != FP32 else 0
        return StageMemory(
            weight_bytes=item * data * sum(shares.values()),
            gradient_bytes=FP32 * data * sum(grown.values()),
            state_bytes=(masters + 2 * FP32) * sum(grown.values()),
            replicated=FP32 * sum(n for alike, n in grown.items() if alike.replicated),
            tied=FP32 * sum(n for alike, n in grown.items() if alike.tied),
        )

    def _groups(self, parts: set[str]) -> Counter[Alike]:
        """Elements by flat buffer. Tied embeddings are one parameter where both are here."""
        found: Counter[Alike] = Counter()
        both = {"embed", "head"} <= parts
        for part in parts:
            for alike, n in self.parts.get(part, {}).items():
                if self._tied and part == "head" and both:
                    continue
                tied = self._tied and part in ("embed", "head") and not both
                found[alike._replace(tied=tied)] += n
        return found


def _local(rule: Rule, key: str, shape: Sequence[int], tp: int) -> tuple[int, bool]:
    """Elements of a parameter on the first tensor-parallel rank, and whether all ranks have the same."""
    tail = math.prod(shape[1:])
    if isinstance(rule, Column):
        return sum(len(share(rows, tp, 0)) for rows in rule.segments) * tail, False
    if isinstance(rule, Row) and key == "weight":
        return shape[0] * len(share(shape[1], tp, 0)), False
    if isinstance(rule, Vocab):
        return len(share(shape[0], tp, 0)) * tail, False
    return math.prod(shape), True
