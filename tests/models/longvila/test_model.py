"""LongVILA gives the logits that a reference gives.

The reference is transformers' SigLIP and Qwen2 with projector and fusion written out in
tools/verify/families/longvila.py, one sample at a time, unpacked and unpadded, eager attention, fp32; it counts
positions for itself. It shares no code with the package. Its matrices are scaled so that two swapped visual tokens or
a position off by one move the logits by far more than rounding (see the tests that say so).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tetrascope.engine.data.collate import collate
from tetrascope.engine.data.document import Document
from tetrascope.models.family import Stage
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.attention import KERNELS
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.longvila.model import two_by_two
from tetrascope.models.weights import Piece
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.longvila import (
    CONTENTS,
    IMAGE,
    V2PE_STRIDE,
    TwoByTwo,
    forward,
    make_case,
    name_on_disk,
    oracle,
    tiny_config,
)

# Of the largest logit. Both sides sum the same products in fp32 in different orders, through five layers.
BOUND = 1e-5

KINDS = {"image": 0, "text": 1, "two images": 2, "video": 3, "image and video": 6}

V2PE = PositionRule("v2pe_fix", V2PE_STRIDE)

CONFIGS = {
    "untied": tiny_config(),
    "tied, by columns, v2pe, pooling head": tiny_config(order="columns", rule=V2PE, tied=True, pooling_head=True),
    "linear": tiny_config("linear"),
    "mlp2x_gelu": tiny_config("mlp2x_gelu", rule=V2PE),
}


def rows(tensors: dict[str, Tensor], piece: Piece) -> Tensor:
    return tensors[piece.tensor.name].reshape(piece.tensor.matrix)[piece.start : piece.start + piece.rows]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The reference and the case whose weights it has."""

    theirs: Any
    case: Case

    @property
    def config(self) -> LongVilaConfig:
        return self.case.config

    @property
    def documents(self) -> tuple[Document, ...]:
        return self.case.documents[: len(CONTENTS)]

    def ours(self, stage: Stage | None = None, attention: str = "sdpa") -> Any:
        """Our model, or a stage of it, with the case's weights: checkpoint tensors stacked as weights.py says."""
        stage = stage or Stage(range(self.config.decoder.layers), first=True, last=True)
        model = FAMILY.build(self.config, stage, KERNELS[attention])
        pieces = FAMILY.weights(self.config)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(torch.cat([rows(self.case.weights, piece) for piece in pieces[name]]))
        return model

    def inputs(self, documents: tuple[Document, ...], pad: int = 0) -> Inputs:
        rows = sum(len(d.ids_T) for d in documents) + pad
        return collate(documents, FAMILY, self.config, rows, 1, 0, True, torch.device("cpu")).inputs


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> Pair:
    case = make_case(CONFIGS[request.param])
    theirs = oracle(case.config)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return Pair(theirs, case)


def error(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    assert ours_TV.shape == theirs_TV.shape
    return (ours_TV - theirs_TV).abs().max().item() / theirs_TV.abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_one_sample(pair: Pair, kind: str) -> None:
    document = pair.documents[KINDS[kind]]
    assert error(pair.ours()(pair.inputs((document,))), forward(pair.theirs, document, pair.config)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("pad", [0, 3])
def test_one_packed_forward_gives_the_logits_of_every_sample(pair: Pair, attention: str, pad: int) -> None:
    logits = pair.ours(attention=attention)(pair.inputs(pair.documents, pad))
    parts = logits.split([*(len(d.ids_T) for d in pair.documents), *([pad] if pad else [])])
    for part, document in zip(parts, pair.documents, strict=False):
        assert error(part, forward(pair.theirs, document, pair.config)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_oracle_would_notice_wrong_positions(pair: Pair, kind: str) -> None:
    # Everything after the first visual token one position too far.
    document = pair.documents[KINDS[kind]]
    good = forward(pair.theirs, document, pair.config)
    positions = torch.from_numpy(document.positions_AT[0] / 256).float()
    assert torch.equal(forward(pair.theirs, document, pair.config, positions), good), "they are its own positions"
    first = int((document.ids_T == IMAGE).argmax())
    positions[first + 1 :] += 1
    assert error(forward(pair.theirs, document, pair.config, positions), good) > 1e-2


@torch.no_grad()
def test_the_oracle_would_notice_swapped_patches_and_places(pair: Pair) -> None:
    document = pair.documents[KINDS["image"]]
    good = forward(pair.theirs, document, pair.config)
    model, inputs = pair.ours(), pair.inputs((document,))
    vision = inputs.vision
    assert vision is not None
    assert error(model(inputs), good) <= BOUND
    swapped = vision.patches_NP.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    changes: list[dict[str, Any]] = [
        {"patches_NP": swapped},
        {"here_KN": vision.here_KN.flip(1)},
        {"picks_CM": vision.picks_CM[:, [1, 0, *range(2, vision.picks_CM.shape[1])]]},
    ]
    for change in changes:
        other = dataclasses.replace(inputs, vision=dataclasses.replace(vision, **change))
        assert error(model(other), good) > 1e-2, change


@torch.no_grad()
def test_unused_parameters_do_not_count(pair: Pair) -> None:
    document = pair.documents[KINDS["image"]]
    model, inputs = pair.ours(), pair.inputs((document,))
    before = model(inputs)
    patterns = FAMILY.unused(pair.config)
    unused = [p for n, p in model.named_parameters() if any(re.fullmatch(pattern, n) for pattern in patterns)]
    # A block has 12 parameters, the final norm 2; the pooling head a probe, four linears and a norm.
    assert len(unused) == 12 + 2 + (11 if pair.config.vision.pooling_head else 0)
    for param in unused:
        param.fill_(float("nan"))
    assert torch.equal(model(inputs), before)


@torch.no_grad()
def test_what_happens_in_one_document_does_not_touch_another(pair: Pair) -> None:
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


def test_gradients_reach_the_pixels_of_their_own_document_alone(pair: Pair) -> None:
    inputs = pair.inputs(pair.documents[:3])  # an image, text, two images
    assert inputs.vision is not None
    patches = inputs.vision.patches_NP.requires_grad_()
    logits = pair.ours()(inputs)
    logits[: len(pair.documents[0].ids_T)].square().sum().backward()
    assert patches.grad is not None
    own = pair.documents[0].media[0].patches
    assert patches.grad[:own].abs().max(dim=1).values.min() > 0
    assert patches.grad[own:].abs().max() == 0


@pytest.mark.parametrize("side", [1, 2, 3, 27, 28])
def test_blocks_of_two_by_two(side: int) -> None:
    frames = torch.randn(2, side * side, 3)
    half = (side + 1) // 2
    expected = TwoByTwo(side, "rows")(frames)
    assert expected.shape == (2, half * half, 12)
    assert torch.equal(two_by_two(frames, side), expected.flatten(0, 1))


def test_blocks_of_two_by_two_golden() -> None:
    # Rows 0 1 2 / 3 4 5 / 6 7 8 with a column and a row of zeros (z) after them.
    z = -0.0
    found = two_by_two(torch.arange(9.0).reshape(1, 9, 1), 3)
    assert found.tolist() == [[0, 1, 3, 4], [2, z, 5, z], [6, 7, z, z], [8, z, z, z]]


def test_rows_after_the_last_frame_are_padding(pair: Pair) -> None:
    if not pair.config.downsample:
        return
    adaptor = pair.ours().adaptor
    x = torch.randn(18, 32)
    padded = torch.cat([x, torch.full((5, 32), float("nan"))])
    assert torch.equal(adaptor(padded), adaptor(x)) and adaptor(x).shape == (8, 64)
