"""What a prediction has to know of a model and of a micro-batch: sizes and what is trained, no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tetrascope.engine import flops
from tetrascope.engine.modules import ModuleOptions, first_trained, trained
from tetrascope.engine.plan.sample import SampleInfo
from tetrascope.engine.predict.activations import EncoderShape, encoder_shape
from tetrascope.engine.predict.memory import Sizes, part_of
from tetrascope.models.family import Family
from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.cut import Cut

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch of one data-parallel rank.

    documents: tokens of each, without padding. media: the images and videos of all of them. rows: token rows with
    padding, before tensor and context parallelism divide them.
    """

    documents: tuple[int, ...]
    media: tuple[Media, ...]
    rows: int

    @classmethod
    def of(cls, infos: Sequence[SampleInfo], layout: Layout) -> MicroBatchShape:
        """The micro-batch of these samples, padded to what the layout divides."""
        documents = tuple(info.tokens for info in infos)
        parts = layout.tp * layout.ring * layout.ulysses
        media = tuple(one for info in infos for one in info.media)
        return cls(documents, media, -(-sum(documents) // parts) * parts)

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.documents)

    @property
    def packed(self) -> tuple[int, ...]:
        """Lengths of the attention sequences: the documents, and the padding as one of its own."""
        pad = self.rows - self.tokens
        return (*self.documents, pad) if pad else self.documents


def parts_of(cut: Cut, chunk: int) -> list[str]:
    """The parts that a chunk holds, in the order in which they compute."""
    found = ["vision", "adaptor"] if chunk == 0 else []
    found += ["embed"] if chunk == cut.first else []
    found += [f"layers.{i}" for i in cut.layers[chunk]]
    return [*found, "norm", "head"] if chunk == cut.last else found


class Model:
    """A model of a family, with the options of every parameter (see `modules.resolve`) and the dtype it computes in.

    trained: which modules are, as the FLOP counts take it. learning: the parts (`part_of`) with anything trained.
    tied: whether embedding and head are one parameter. below_head: whether anything before the head is trained.
    """

    def __init__(self, family: Family, config: Any, modules: Mapping[str, ModuleOptions], dtype: str) -> None:
        self.family, self.config, self.modules, self.dtype = family, config, modules, dtype
        self.item = DTYPE_BYTES[dtype]
        self.trained = trained(modules)
        self.learning = frozenset(part_of(name) for name, own in modules.items() if not own.frozen)
        self.weights = family.weights(config)
        self.encoder: EncoderShape = encoder_shape(config, self.weights)
        self.tied = self.weights["head.weight"] == self.weights["embed.weight"]

        below = not self.learning.isdisjoint(("vision", "adaptor", "embed"))
        self._kinds = []
        for i in range(config.decoder.layers):
            self._kinds.append((f"layers.{i}" in self.learning, below))
            below = below or f"layers.{i}" in self.learning
        self.below_head = below or "norm" in self.learning
        self._sizes: dict[int, Sizes] = {}
        self._frozen: dict[Cut, int] = {}

    def sizes(self, tp: int) -> Sizes:
        """What a tensor-parallel rank holds of every part."""
        if tp not in self._sizes:
            table = self.family.sharding(self.config)
            self._sizes[tp] = Sizes(self.weights, table, self.modules, self.tied, tp)
        return self._sizes[tp]

    def frozen_chunks(self, cut: Cut) -> int:
        """How many of the first chunks compute no gradients: nothing in them or before them is trained."""
        if cut not in self._frozen:
            self._frozen[cut] = first_trained(cut, self.modules)
        return self._frozen[cut]

    def layer_kind(self, layer: int) -> tuple[bool, bool]:
        """Whether a decoder layer is trained, and whether anything before it is."""
        return self._kinds[layer]

    def flops(self, micro_batches: Sequence[MicroBatchShape]) -> float:
        """Forward and backward of all of them: the model's work, without what recomputing adds."""
        return sum(sum(flops.training_flops(self.config, m.media, m.documents, self.trained)) for m in micro_batches)
