"""Packing: what each tensor-parallel rank gets is one share of what a single rank would get.

The oracle is the documents themselves: everything is put together again from the shares and compared with them. A
label that crosses a border between documents, or a visual token that two ranks or none own, would train without any
error.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tetrascope.engine.data.collate import MicroBatch, collate
from tetrascope.engine.data.document import Document
from tetrascope.engine.data.vision import encoded_here
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.parallel.tensor.placement import share
from tetrascope.tools.verify.families.qwen2_vl import CONTENTS, PAD, make_document, tiny_config

CONFIG = tiny_config()
CPU = torch.device("cpu")
PACKS = {
    "all": CONTENTS,
    "one image": CONTENTS[:1],
    "text and images": CONTENTS[1:4],
    "image first": CONTENTS[4:6],
    "odd number of blocks": ((2, (1, 2, 6), 1, (5, 2, 2), 3),),
}


def documents(name: str) -> list[Document]:
    return [make_document(CONFIG, content, seed=i) for i, content in enumerate(PACKS[name])]


def collated(packed: list[Document], tp: int = 1, tp_rank: int = 0, encode: bool = True, pad: int = 0) -> MicroBatch:
    tokens = sum(len(d.ids_T) for d in packed) + pad
    return collate(packed, FAMILY, CONFIG, -(-tokens // tp) * tp, tp, tp_rank, encode, CPU)


def test_tokens_positions_and_borders() -> None:
    packed = documents("all")
    batch = collated(packed)
    assert torch.equal(batch.inputs.token_ids_T, torch.from_numpy(np.concatenate([d.ids_T for d in packed])))
    positions = np.concatenate([d.positions_AT for d in packed], axis=1)
    assert torch.equal(batch.inputs.positions_AT, torch.from_numpy(positions))
    assert batch.inputs.documents.lengths == tuple(len(d.ids_T) for d in packed)
    assert batch.inputs.documents.total == len(batch.labels_T) == sum(len(d.ids_T) for d in packed)


def test_labels_are_the_next_token_of_the_same_document() -> None:
    packed = documents("all")
    batch = collated(packed)
    start = 0
    for document in packed:
        length = len(document.ids_T)
        labels, weights = batch.labels_T[start : start + length], batch.weights_T[start : start + length]
        assert labels[:-1].tolist() == document.ids_T[1:].tolist()
        assert weights[:-1].tolist() == document.weights_T[1:].tolist()
        assert weights[-1] == 0  # whatever follows in the pack, the last token predicts nothing
        start += length
    assert batch.labels_T.dtype == torch.int64 and batch.weights_T.dtype == torch.float32


def test_a_supervised_first_token_is_nobodys_target() -> None:
    first, second = (
        Document(np.array(ids), np.zeros((3, 2), dtype=np.int64), np.ones(2, dtype=np.float32), (), None)
        for ids in ([10, 11], [12, 13])
    )
    batch = collated([first, second])
    assert batch.weights_T.tolist() == [1, 0, 1, 0]
    assert batch.labels_T.tolist() == [11, 0, 13, 0]


def test_padding_is_a_document_of_its_own_without_weight() -> None:
    packed = documents("text and images")
    plain, padded = collated(packed), collated(packed, pad=5)
    n = sum(len(d.ids_T) for d in packed)
    assert padded.inputs.documents.lengths == (*plain.inputs.documents.lengths, 5)
    assert padded.inputs.token_ids_T[n:].tolist() == [PAD] * 5
    assert padded.weights_T[n:].tolist() == padded.labels_T[n:].tolist() == [0] * 5
    assert padded.inputs.positions_AT[:, n:].tolist() == [[0] * 5] * 3
    for ours, theirs in (
        (padded.inputs.token_ids_T, plain.inputs.token_ids_T),
        (padded.labels_T, plain.labels_T),
        (padded.weights_T, plain.weights_T),
        (padded.inputs.positions_AT, plain.inputs.positions_AT),
    ):
        assert torch.equal(ours[..., :n], theirs)


def test_a_pad_row_never_counts_as_visual() -> None:
    # Nothing forbids a configuration whose padding token is the image token.
    config = dataclasses.replace(CONFIG, pad_token_id=CONFIG.image_token_id)
    packed = documents("text and images")
    rows = sum(len(d.ids_T) for d in packed) + 4
    batch = collate(packed, FAMILY, config, rows, 1, 0, True, CPU)
    expected = collated(packed).inputs.vision
    assert batch.inputs.vision is not None and expected is not None
    assert torch.equal(batch.inputs.vision.rows_M, expected.rows_M)


def test_no_vision_where_there_is_none() -> None:
    text = [make_document(CONFIG, (n,), seed=n) for n in (4, 7)]
    assert collated(text).inputs.vision is None
    assert collated(text, tp=2, tp_rank=1).inputs.vision is None
    assert collated(documents("all"), encode=False).inputs.vision is None


def test_stages_that_do_not_encode_need_no_pixels() -> None:
    bare = [dataclasses.replace(d, patches=None) for d in documents("all")]
    batch, full = collated(bare, encode=False), collated(documents("all"))
    assert torch.equal(batch.inputs.token_ids_T, full.inputs.token_ids_T)
    assert torch.equal(batch.labels_T, full.labels_T) and torch.equal(batch.weights_T, full.weights_T)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", PACKS)
def test_shares_of_all_ranks_make_the_whole(name: str, tp: int) -> None:
    packed = documents(name)
    batches = [collated(packed, tp, rank, pad=1) for rank in range(tp)]
    vision = [batch.inputs.vision for batch in batches]
    block = CONFIG.vision.merge**2
    patches = np.concatenate([d.patches for d in packed if d.patches is not None])
    ids = batches[0].inputs.token_ids_T

    # Patch rows: equal shares of whole merge blocks, the last ones filled up with zeros.
    shares = [v.patches_NP for v in vision if v is not None]
    assert len(shares) == tp and len({s.shape for s in shares}) == 1 and shares[0].shape[0] % block == 0
    together = torch.cat(shares)
    assert torch.equal(together[: len(patches)], torch.from_numpy(patches))
    assert together[len(patches) :].abs().sum() == 0 and len(together) - len(patches) < block * tp

    # Frames and their positions are those of all patches, on every rank.
    media = [one for d in packed for one in d.media]
    positions, frames = FAMILY.vision_layout(CONFIG, media).positions_KN, tuple(n for one in media for n in one.frames)
    for v in (v for v in vision if v is not None):
        assert v.frames.lengths[: len(frames)] == frames and v.frames.total == len(together)
        assert torch.equal(v.positions_KN[:, : len(patches)], positions)
        assert v.positions_KN.shape == (2, len(together))

    # Every visual token is replaced once, on the rank that holds its row, by the feature of its number.
    places = []
    for rank, v in enumerate(v for v in vision if v is not None):
        held = share(len(ids), tp, rank)
        assert len(held) * tp == len(ids)
        assert all(0 <= row < len(held) for row in v.rows_M.tolist())
        rows, picks = v.rows_M.tolist(), v.picks_CM[0].tolist()
        places += [(held.start + row, pick) for row, pick in zip(rows, picks, strict=True)]
    real = sum(len(d.ids_T) for d in packed)
    visual = [row for row, i in enumerate(ids[:real].tolist()) if i in FAMILY.visual_ids(CONFIG)]
    assert places == list(zip(visual, range(len(patches) // block), strict=True))

    # Tokens, labels and weights are whole on every rank: they are cut later, where they are used.
    for batch in batches[1:]:
        assert torch.equal(batch.inputs.token_ids_T, ids)
        assert torch.equal(batch.labels_T, batches[0].labels_T)
        assert torch.equal(batch.weights_T, batches[0].weights_T)


def test_a_rank_without_visual_tokens_still_encodes_its_share() -> None:
    # The image lies in the first half of the tokens, its patches on both ranks.
    packed = [make_document(CONFIG, (1, (1, 4, 4), 30), seed=0)]
    vision = collated(packed, 2, 1).inputs.vision
    assert vision is not None
    assert vision.rows_M.tolist() == vision.picks_CM[0].tolist() == []
    assert vision.patches_NP.shape == (8, 1176) and vision.patches_NP.abs().min() > 0


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_what_a_rank_does_not_encode_it_need_not_read(name: str, tp: int) -> None:
    """Without the patches of the other documents nothing changes; without one of its own it would."""
    packed = documents(name)
    patches, media = [sum(one.patches for one in d.media) for d in packed], [d.media for d in packed]
    for rank in range(tp):
        here = encoded_here(media, FAMILY, CONFIG, tp, rank)
        less = [d if h else dataclasses.replace(d, patches=None) for d, h in zip(packed, here, strict=True)]
        expected, found = collated(packed, tp, rank).inputs.vision, collated(less, tp, rank).inputs.vision
        assert expected is not None and found is not None
        assert torch.equal(found.patches_NP, expected.patches_NP)
        for number, needed in enumerate(here):
            if needed:
                hole = [dataclasses.replace(d, patches=None) if i == number else d for i, d in enumerate(packed)]
                other = collated(hole, tp, rank).inputs.vision
                assert other is not None and not torch.equal(other.patches_NP, expected.patches_NP)
    shared = [sum(encoded_here(media, FAMILY, CONFIG, tp, rank)) for rank in range(tp)]
    assert sum(shared) <= sum(n > 0 for n in patches) + tp - 1, "each border cuts at most one document"
