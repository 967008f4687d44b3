"""Packing under context parallelism: the ranks' parts, put together and exchanged as they say, are the whole.

The oracle is the pack of a single rank. Features are stood in for by sums over merge blocks of random pixels, so that
each is recognised wherever it goes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tetrascope.engine import flops
from tetrascope.engine.data.collate import MicroBatch, SharedPack, collate
from tetrascope.engine.data.document import ContextPlace, Document
from tetrascope.engine.data.vision import FeatureExchange, encoded_here, visual_sharding
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.parallel.context.visual import shard_visual
from tetrascope.tools.verify.families import qwen2_5_vl, qwen2_vl
from tetrascope.tools.verify.families.qwen2_vl import CONTENTS, make_document, tiny_config

CONFIG = tiny_config()
CPU = torch.device("cpu")
PACKS = {
    "all": CONTENTS,
    "one image": ((300, (1, 4, 6), 200),),
    "text": ((40,), (7,)),
    "a long video": ((5, (16, 4, 4), 30), (3, (1, 2, 2), 4)),
}
DEGREES = [(r, u, tp) for r, u, tp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2)) if 1 < r * u <= 8]
BLOCK = CONFIG.vision.merge**2


def documents(name: str) -> list[Document]:
    """Pixels are whole numbers, so that sums are exact in any order."""
    made = [make_document(CONFIG, content, seed=i) for i, content in enumerate(PACKS[name])]
    return [d if d.patches is None else dataclasses.replace(d, patches=np.round(64 * d.patches)) for d in made]


def places(ring: int, ulysses: int) -> list[ContextPlace]:
    return [ContextPlace(ring, ulysses, r, u) for r in range(ring) for u in range(ulysses)]


def collated(packed: list[Document], place: ContextPlace, tp: int = 1, tp_rank: int = 0) -> MicroBatch:
    tokens = sum(len(d.ids_T) for d in packed)
    unit = place.ranks * tp
    return collate(packed, FAMILY, CONFIG, -(-tokens // unit) * unit, tp, tp_rank, True, CPU, place)


@pytest.mark.parametrize(("ring", "ulysses", "tp"), DEGREES)
@pytest.mark.parametrize("name", PACKS)
def test_rows_of_all_ranks_make_the_pack(name: str, ring: int, ulysses: int, tp: int) -> None:
    packed = documents(name)
    tokens = sum(len(d.ids_T) for d in packed)
    whole = collate(packed, FAMILY, CONFIG, tokens, 1, 0, True, CPU)
    batches = [collated(packed, place, tp) for place in places(ring, ulysses)]
    assert len({len(batch.labels_T) for batch in batches}) == 1 and len(batches[0].labels_T) % tp == 0
    order = np.concatenate([batch.order_T for batch in batches])
    assert sorted(order.tolist()) == list(range(len(order)))  # every row once, those of the padding too
    real = order < tokens
    for of in (
        lambda b: b.inputs.token_ids_T,
        lambda b: b.inputs.positions_AT.T,
        lambda b: b.labels_T,
        lambda b: b.weights_T,
    ):
        together = torch.cat([of(batch) for batch in batches])
        assert torch.equal(together[real], of(whole)[order[real]])
    assert all(batch.weights_T[batch.order_T >= tokens].sum() == 0 for batch in batches)
    for batch in batches:
        assert isinstance(batch.inputs.documents, SharedPack) and batch.inputs.documents.total == len(batch.labels_T)
    for number, document in enumerate(packed):
        held = [batch.rows_of(number) for batch in batches]
        assert sorted(np.concatenate([token for _, token in held]).tolist()) == list(range(len(document.ids_T)))
        for batch, (rows, token) in zip(batches, held, strict=True):
            assert batch.inputs.token_ids_T[rows].tolist() == document.ids_T[token].tolist()


@pytest.mark.parametrize(("ring", "ulysses", "tp"), DEGREES)
@pytest.mark.parametrize("name", ["all", "one image", "a long video"])
def test_features_reach_their_tokens(name: str, ring: int, ulysses: int, tp: int) -> None:
    packed = documents(name)
    patches = np.concatenate([d.patches for d in packed if d.patches is not None])
    expected = torch.from_numpy(patches).unflatten(0, (-1, BLOCK)).sum((1, 2))
    all_places, found = places(ring, ulysses), {}
    grid = [[collated(packed, place, tp, t) for t in range(tp)] for place in all_places]
    # Every tensor-parallel rank ends with all features of its context-parallel rank.
    computed = [
        torch.cat([b.inputs.vision.patches_NP for b in ranks if b.inputs.vision]).unflatten(0, (-1, BLOCK)).sum((1, 2))
        for ranks in grid
    ]
    ids = torch.cat([ranks[0].inputs.token_ids_T for ranks in grid])
    for t in range(tp):
        routes = [ranks[t].inputs.vision.exchange for ranks in grid if ranks[t].inputs.vision]
        assert all(isinstance(route, FeatureExchange) for route in routes)
        for c, ranks in enumerate(grid):
            batch, vision = ranks[t], ranks[t].inputs.vision
            assert vision is not None and vision.weights_CM is None
            received = []
            for source, route in enumerate(routes):
                sent = computed[source][route.send_rows].split(route.send_counts)[c]
                assert len(sent) == routes[c].receive_counts[source]
                received.append(sent)
            features = torch.cat(received)
            assert len(features) == vision.features
            share = len(batch.labels_T) // tp
            rows = batch.order_T[t * share : (t + 1) * share][vision.rows_M.numpy()]
            found.update(zip(rows.tolist(), features[vision.picks_CM[0]].tolist(), strict=True))
    visual = np.flatnonzero(np.isin(np.concatenate([d.ids_T for d in packed]), FAMILY.visual_ids(CONFIG)))
    assert [found[row] for row in visual.tolist()] == expected.tolist() and len(found) == len(visual) and len(ids)


@pytest.mark.parametrize(("ring", "ulysses", "tp"), DEGREES)
def test_encoding_is_divided_and_frames_are_whole(ring: int, ulysses: int, tp: int) -> None:
    packed = documents("a long video")
    batches = [collated(packed, place) for place in places(ring, ulysses)]
    frames = [n for b in batches if b.inputs.vision for n in b.inputs.vision.frames.lengths]
    assert sorted(frames) == sorted(n for d in packed for one in d.media for n in one.frames)
    rows = [len(b.inputs.vision.patches_NP) for b in batches if b.inputs.vision]
    assert max(rows) <= -(-sum(rows) // len(rows) // 16) * 16 + 16  # a frame has 16 rows


@pytest.mark.parametrize(("ring", "ulysses", "tp"), DEGREES)
def test_what_a_rank_does_not_encode_it_need_not_read(ring: int, ulysses: int, tp: int) -> None:
    packed = documents("all")
    media = [d.media for d in packed]
    readers = 0
    for place, t in itertools.product(places(ring, ulysses), range(tp)):
        here = encoded_here(media, FAMILY, CONFIG, tp, t, place)
        less = [d if h else dataclasses.replace(d, patches=None) for d, h in zip(packed, here, strict=True)]
        expected, found = (collated(docs, place, tp, t).inputs.vision for docs in (packed, less))
        assert expected is not None and found is not None and torch.equal(found.patches_NP, expected.patches_NP)
        readers += sum(here)
        for number in np.flatnonzero(here).tolist():
            hole = [dataclasses.replace(d, patches=None) if i == number else d for i, d in enumerate(packed)]
            other = collated(hole, place, tp, t).inputs.vision
            assert other is not None and not torch.equal(other.patches_NP, expected.patches_NP)
    assert readers < sum(map(bool, media)) * place.ranks * tp


@pytest.mark.parametrize("other", [qwen2_vl, qwen2_5_vl], ids=lambda family: family.__name__.rpartition(".")[2])
def test_units_are_weighed_by_their_work(other: Any) -> None:
    """Multiply-adds of encoder and adaptor, as they are counted elsewhere, for pictures and for frames of a video."""
    config = other.tiny_config()
    media = [one for grid in ((1, 8, 6), (4, 4, 6)) for one in other.make_document(config, (2, grid), 0).media]
    with mock.patch("tetrascope.engine.data.vision.shard_visual", wraps=shard_visual) as divided:
        visual_sharding(media, config, 2)
    rows, _, costs, _ = divided.call_args.args
    assert len(rows) == 5 and 2 * sum(costs) == pytest.approx(flops.vision_forward(config, media))
    assert 2 * costs[0] == pytest.approx(flops.vision_forward(config, media[:1]))
