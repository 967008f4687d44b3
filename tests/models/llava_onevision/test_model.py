"""LLaVA-OneVision gives the logits that transformers' model gives.

The oracle is transformers' LlavaOnevisionForConditionalGeneration with the same weights, one sample at a time, unpacked
and unpadded, eager attention, fp32. It shares no code with this package: it cuts, shrinks and joins feature maps with
torch's own operators where this package has tables of indices and weights. Matrices are scaled up: with
default-initialised ones attention is flat and hides wrong positions (`test_the_oracle_would_notice_wrong_positions`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tetrascope.engine.data.collate import collate
from tetrascope.engine.data.document import Document
from tetrascope.models.family import Stage
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.attention import KERNELS
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.weights import Piece
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.llava_onevision import (
    CONTENTS,
    forward,
    make_case,
    name_on_disk,
    oracle,
    variants,
)

# Of the largest logit. Both sides sum the same products in fp32 in different orders, through up to eight layers: 2e-6
# is the largest measured. A position that is off by one moves logits by 6 % of the largest and more.
BOUND = 1e-5

KINDS = {"image": 0, "text": 1, "two images": 2, "video": 3, "shrunk image": 4, "image and video": 6, "small image": 7}


def rows(tensors: dict[str, Tensor], piece: Piece) -> Tensor:
    return tensors[piece.tensor.name].reshape(piece.tensor.matrix)[piece.start : piece.start + piece.rows]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Transformers' model and the case whose weights it has."""

    theirs: Any
    case: Case

    @property
    def documents(self) -> tuple[Document, ...]:
        return self.case.documents[: len(CONTENTS)]

    def ours(self, stage: Stage | None = None, attention: str = "sdpa") -> Any:
        """Our model, or a stage of it, with the case's weights: Hugging Face tensors stacked as weights.py says."""
        config = self.case.config
        stage = stage or Stage(range(config.decoder.layers), first=True, last=True)
        model = FAMILY.build(config, stage, KERNELS[attention])
        pieces = FAMILY.weights(config)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(torch.cat([rows(self.case.weights, piece) for piece in pieces[name]]))
        return model

    def inputs(self, documents: tuple[Document, ...], pad: int = 0) -> Inputs:
        total = sum(len(d.ids_T) for d in documents) + pad
        return collate(documents, FAMILY, self.case.config, total, 1, 0, True, torch.device("cpu")).inputs


def pair_of(case: Case) -> Pair:
    theirs = oracle(case.config)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return Pair(theirs, case)


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(variants()[request.param])


def assert_same_logits(ours_TV: Tensor, theirs_TV: Tensor) -> None:
    assert ours_TV.shape == theirs_TV.shape
    error, largest = (ours_TV - theirs_TV).abs().max().item(), theirs_TV.abs().max().item()
    assert error <= BOUND * largest


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_one_sample(pair: Pair, kind: str) -> None:
    document = pair.documents[KINDS[kind]]
    assert_same_logits(pair.ours()(pair.inputs((document,))), forward(pair.theirs, document))


@torch.no_grad()
@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("pad", [0, 3])
def test_one_packed_forward_gives_the_logits_of_every_sample(pair: Pair, attention: str, pad: int) -> None:
    logits = pair.ours(attention=attention)(pair.inputs(pair.documents, pad))
    parts = logits.split([*(len(d.ids_T) for d in pair.documents), *([pad] if pad else [])])
    for part, document in zip(parts, pair.documents, strict=False):
        assert_same_logits(part, forward(pair.theirs, document))


def test_samples_cover_what_an_image_can_become() -> None:
    several = {name: [one for d in case.documents for one in d.media] for name, case in variants().items()}
    for name, media in several.items():
        grids = {one.grid for one in media if one.kind == "image"}
        assert (((0, 0) in grids) == (name == "untied")) and {(1, 1), (1, 3), (2, 3), (3, 1)} <= grids
        assert max(len(one.frames) for one in media if one.kind == "video") > 3


@torch.no_grad()
def test_the_oracle_would_notice_wrong_positions(pair: Pair) -> None:
    for number in KINDS.values():
        document = pair.documents[number]
        positions = torch.from_numpy(document.positions_AT) // 256
        assert torch.equal(forward(pair.theirs, document, positions), forward(pair.theirs, document))
        late = positions.clone()
        late[:, len(document.ids_T) // 2 :] += 1
        moved = forward(pair.theirs, document, late) - forward(pair.theirs, document)
        assert moved.abs().max() > 0.05 * forward(pair.theirs, document).abs().max()


@torch.no_grad()
def test_logits_by_the_variable_positions_of_v2pe(pair: Pair) -> None:
    config = dataclasses.replace(pair.case.config, positions=PositionRule("v2pe_fix", 64))
    document = pair.documents[KINDS["two images"]]
    positions = FAMILY.positions(config, document.ids_T, document.media, (0, 0, 0))
    ours = pair.ours()(pair.inputs((dataclasses.replace(document, positions_AT=positions),)))
    assert_same_logits(ours, forward(pair.theirs, document, torch.from_numpy(positions) / 256))
    assert (ours - forward(pair.theirs, document)).abs().max() > 0.05 * ours.abs().max()


@torch.no_grad()
def test_samples_of_a_pack_do_not_touch(pair: Pair) -> None:
    # Bit-equal: other pixels and other text in one document leave every other document's logits as they were.
    documents = list(pair.documents)
    changed = 2
    shown = documents[changed].patches
    assert shown is not None
    ids = documents[changed].ids_T.copy()
    ids[-1] = ids[-2] + 1
    documents[changed] = dataclasses.replace(documents[changed], ids_T=ids, patches=shown[::-1].copy())
    model, lengths = pair.ours(), [len(d.ids_T) for d in documents]
    before = model(pair.inputs(pair.documents)).split(lengths)
    after = model(pair.inputs(tuple(documents))).split(lengths)
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert same == [i != changed for i in range(len(documents))]


@torch.no_grad()
def test_stages_in_a_row_are_the_whole_model(pair: Pair) -> None:
    inputs = pair.inputs(pair.documents)
    stages = [Stage(range(0, 1), True, False), Stage(range(1, 4), False, False), Stage(range(4, 5), False, True)]
    hidden = None
    for stage in stages:
        hidden = pair.ours(stage)(inputs, hidden)
    assert hidden is not None and torch.equal(hidden, pair.ours()(inputs))


def test_newline_has_a_gradient_and_unused_parameters_have_none(pair: Pair) -> None:
    model = pair.ours()
    document = pair.documents[0]
    model(pair.inputs((document,))).square().sum().backward()
    assert model.adaptor.newline.grad.abs().min() > 0
    without = {name for name, param in model.named_parameters() if param.grad is None}
    patterns = FAMILY.unused(pair.case.config)
    unused = {n for n, _ in model.named_parameters() if any(re.fullmatch(pattern, n) for pattern in patterns)}
    assert without == unused


@torch.no_grad()
def test_text_alone_needs_no_encoder(pair: Pair) -> None:
    model = pair.ours()
    text = (pair.documents[1], pair.documents[5])
    inputs = pair.inputs(text)
    assert inputs.vision is None
    model.vision = model.adaptor = None
    lengths = [len(d.ids_T) for d in text]
    for part, document in zip(model(inputs).split(lengths), text, strict=True):
        assert_same_logits(part, forward(pair.theirs, document))


@torch.no_grad()
def test_a_square_image_has_no_newline() -> None:
    # The original's first stage, which transformers has no rule for: the oracle is the padded rule, whose features are
    # the same but for the newline at the end.
    case = make_case()
    config = dataclasses.replace(case.config, single_image="square")
    pair = pair_of(dataclasses.replace(case, config=config))
    padded = pair.documents[2]
    one = dataclasses.replace(padded.media[0], tokens=padded.media[0].features)
    assert padded.patches is not None
    ids = np.concatenate([np.full(9, config.image_token_id), padded.ids_T[-5:]])
    square = Document(ids, np.arange(14)[None] * 256, np.ones(14, dtype=np.float32), (one,), padded.patches[:9])
    with_newline = np.insert(ids, 9, config.image_token_id)
    longer = Document(
        with_newline, np.arange(15)[None] * 256, np.ones(15, dtype=np.float32), padded.media[:1], padded.patches[:9]
    )
    ours = [pair.ours()(pair.inputs((d,))) for d in (square, longer)]
    assert torch.allclose(ours[0][:9], ours[1][:9], atol=1e-6)
    assert not torch.allclose(ours[0][9:], ours[1][10:], atol=1e-2)
