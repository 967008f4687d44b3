"""A rank's part in encoding the images of a micro-batch: its patch rows, and which features its tokens are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import ALONE, ContextPlace, Document
from tetrascope.models.family import Family, ModelConfig
from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.packed import Packed
from tetrascope.models.media import Media, square_pairs
from tetrascope.parallel.context.tokens import TokenSharding
from tetrascope.parallel.context.visual import (
    VisualSharding,
    features_of_frames,
    route_features,
    shard_visual,
    visual_places,
)
from tetrascope.parallel.tensor.placement import share


@dataclass(frozen=True)
class Place:
    """A rank's place in tensor and context parallelism; tokens: where the rows of the pack lie, None on one rank."""

    tp: int
    tp_rank: int
    context: ContextPlace
    tokens: TokenSharding | None


@dataclass(frozen=True)
class FeatureExchange:
    """A rank's part in bringing features to their tokens' owners (`FeatureRoute`): int64 `[S]` rows to send, and
    numbers of rows to and from every context-parallel rank."""

    send_rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


def encoded_here(
    media: Sequence[Sequence[Media]],
    family: Family,
    config: Any,
    tp: int,
    tp_rank: int,
    context: ContextPlace = ALONE,
) -> list[bool]:
    """For documents with these images and videos, in their order in a micro-batch: whether this rank encodes some of
    their patch rows."""
    own = visual_sharding([one for d in media for one in d], config, context.ranks).rows_of(context.rank)
    mine = own[_tp_share(len(own), family, config, tp, tp_rank)]
    ends = list(accumulate((sum(one.patches for one in d) for d in media), initial=0))
    return [bool(((mine >= a) & (mine < b)).any()) for a, b in pairwise(ends)]


def visual_sharding(media: Sequence[Media], config: ModelConfig, ranks: int) -> VisualSharding:
    """The encoder's attention sequences (frames, tiles, views) divided over the context-parallel ranks by cost."""
    cost = config.vision_cost
    rows, features, costs = [], [], []
    for one in media:
        per_frame = (
            features_of_frames(one.frames, one.features) if ranks > 1 else (one.features, *[0] * len(one.frames))
        )
        windowed = cost.window_attention * square_pairs(one.windows) / max(1, one.patches)
        for length, count in zip(one.frames, per_frame, strict=False):
            rows.append(length)
            features.append(count)
            costs.append(
                (cost.patch + cost.linears + windowed) * length + cost.attention * length**2 + cost.adaptor * count
            )
    return shard_visual(rows, features, costs, ranks)


def _padding(rows: int, family: Family, config: Any, tp: int) -> int:
    """Rows that make whole row blocks of every tensor-parallel rank's share."""
    return -rows % (family.row_block(config) * tp)


def _tp_share(rows: int, family: Family, config: Any, tp: int, tp_rank: int) -> slice:
    own = (rows + _padding(rows, family, config, tp)) // tp
    return slice(tp_rank * own, (tp_rank + 1) * own)


def vision_inputs(
    documents: Sequence[Document],
    family: Family,
    config: Any,
    visual_rows: np.ndarray,
    rows: int,
    place: Place,
    device: torch.device,
) -> VisionInputs:
    """What this rank encodes, padded so that every tensor-parallel rank has as many whole row blocks.

    visual_rows: int64 `[V]`, the rows of the pack that are visual tokens. rows: of the pack.
    """
    media = [one for d in documents for one in d.media]
    layout = family.vision_layout(config, media)
    context = place.context
    sharding = visual_sharding(media, config, context.ranks)
    own = sharding.rows_of(context.rank)
    pad = _padding(len(own), family, config, place.tp)
    here = _tp_share(len(own), family, config, place.tp, place.tp_rank)
    positions_KN = torch.nn.functional.pad(layout.positions_KN[:, torch.from_numpy(own)], (0, pad)).to(device)
    frames = sharding.frames(context.rank)
    windows = sharding.windows(context.rank, [n for one in media for n in one.windows]) if media[0].windows else ()
    if place.tokens is None:
        mine = share(rows, place.tp, place.tp_rank)
        tokens = np.flatnonzero((visual_rows >= mine.start) & (visual_rows < mine.stop))
        token_rows, features, exchange = visual_rows[tokens] - mine.start, sum(sharding.features), None
        picks_CM = layout.picks_CV[:, tokens]
    else:
        places = visual_places(visual_rows, place.tokens, place.tp_rank)
        tokens, token_rows = places[context.rank]
        route = route_features(sharding, layout.picks_CV.numpy(), [t for t, _ in places])[context.rank]
        features, picks_CM = route.received, torch.from_numpy(route.picks_CM)
        send_rows = torch.from_numpy(route.send_rows).to(device)
        exchange = FeatureExchange(send_rows, route.send_counts, route.receive_counts)
    return VisionInputs(
        patches_NP=torch.from_numpy(_patches(documents, own, pad, here, config.vision.patch_width)).to(device),
        positions_KN=positions_KN,
        here_KN=positions_KN[:, here],
        frames=Packed((*frames, pad) if pad else frames),
        windows=Packed((*windows, pad) if pad else windows) if media[0].windows else None,
        features=features,
        rows_M=torch.from_numpy(token_rows).to(device),
        picks_CM=picks_CM.to(device),
        weights_CM=None if layout.weights_CV is None else layout.weights_CV[:, tokens].to(device),
        exchange=exchange,
    )


def _patches(documents: Sequence[Document], own: np.ndarray, pad: int, here: slice, width: int) -> np.ndarray:
    """Patch rows float32 `[N, P]` of this rank: those at `here` of its context-parallel rank's rows and padding."""
    wanted = own[here]
    found, start = [], 0
    for d in documents:
        count = sum(one.patches for one in d.media)
        rows = wanted[(wanted >= start) & (wanted < start + count)] - start
        if len(rows):
            found.append(np.zeros((len(rows), width), dtype=np.float32) if d.patches is None else d.patches[rows])
        start += count
    blank = (here.stop - here.start) - len(wanted)
    return np.ascontiguousarray(np.concatenate([*found, np.zeros((blank, width), dtype=np.float32)]))
