"""From samples to the tensors of a packed micro-batch, as one rank sees them.

Everything is computed on the whole micro-batch first and cut afterwards: labels are shifted inside each document
before any padding, positions never depend on the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import ALONE, ContextPlace, Document
from tetrascope.engine.data.vision import Place, vision_inputs
from tetrascope.models.family import Family
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.packed import Packed
from tetrascope.parallel.context.attention import AttentionPlan
from tetrascope.parallel.context.tokens import shard_tokens


@dataclass(frozen=True)
class SharedPack(Packed):
    """A rank's rows of a pack that context parallelism divides: `lengths` is their number; `context` says which
    documents they are of."""

    context: AttentionPlan


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of the model, and for each row the token that follows it and the weight of predicting it.

    order_T: int64 `[T]`, the row of the whole pack that each of this rank's rows is. lengths: of all documents.
    """

    inputs: Inputs
    labels_T: Tensor
    weights_T: Tensor
    order_T: np.ndarray
    lengths: tuple[int, ...]

    def rows_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows of a document, by its number in the micro-batch, and which of its tokens they are."""
        start = sum(self.lengths[:number])
        rows = np.flatnonzero((self.order_T >= start) & (self.order_T < start + self.lengths[number]))
        return rows, self.order_T[rows] - start


def collate(
    documents: Sequence[Document],
    family: Family,
    config: Any,
    rows: int,
    tp: int,
    tp_rank: int,
    encode: bool,
    device: torch.device,
    context: ContextPlace = ALONE,
) -> MicroBatch:
    """Packs documents into `rows` token rows (padding goes into a document of its own, weight zero).

    encode: whether this rank runs the vision encoder; then its share of the patch rows and of the visual tokens is
    prepared too. rows must divide by tp and by the context-parallel ranks, of which each gets a part of the rows.
    """
    lengths = tuple(len(d.ids_T) for d in documents)
    total = sum(lengths)
    pad = rows - total
    ids = np.concatenate([*(d.ids_T for d in documents), np.full(pad, config.pad_token_id, dtype=np.int64)])
    axes = documents[0].positions_AT.shape[0]
    positions = np.concatenate([*(d.positions_AT for d in documents), np.zeros((axes, pad), dtype=np.int64)], axis=1)
    labels = np.concatenate([*(_next(d.ids_T) for d in documents), np.zeros(pad, dtype=np.int64)])
    weights = np.concatenate([*(_next(d.weights_T) for d in documents), np.zeros(pad, dtype=np.float32)])
    # What the features replace is looked for in the documents alone: a pad row must never count as visual.
    visual = np.flatnonzero(np.isin(ids[:total], family.visual_ids(config)))
    order, packed = np.arange(rows), Packed((*lengths, pad) if pad else lengths)
    sharding = None
    if context.ranks > 1:
        sharding = shard_tokens(lengths, context.ring, context.ulysses, tp, rows)
        order = sharding.rows_of(context.rank)
        packed = SharedPack((len(order),), AttentionPlan(sharding, context.ring_rank))
        ids, positions, labels, weights = ids[order], positions[:, order], labels[order], weights[order]
    vision = None
    if encode and any(d.media for d in documents):
        where = Place(tp, tp_rank, context, sharding)
        vision = vision_inputs(documents, family, config, visual, rows, where, device)
    inputs = Inputs(
        token_ids_T=torch.from_numpy(ids).to(device),
        positions_AT=torch.from_numpy(positions).to(device),
        documents=packed,
        vision=vision,
    )
    return MicroBatch(inputs, torch.from_numpy(labels).to(device), torch.from_numpy(weights).to(device), order, lengths)


def _next(x_T: np.ndarray) -> np.ndarray:
    """Shifts a document by one: row i gets what belongs to token i+1, the last row zero."""
    return np.concatenate([x_T[1:], np.zeros(1, dtype=x_T.dtype)])
