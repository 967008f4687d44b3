"""LLaVA-1.5 gives the logits that transformers' model gives.

The oracle is transformers' LlavaForConditionalGeneration with the same weights, one sample at a time, unpacked and
unpadded, eager attention, fp32; it computes plain positions for itself, and is given those of V2PE, reckoned without
our code (`v2pe_positions`). Its matrices are scaled so that attention is not flat; that mistakes would show is tested
here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
from tetrascope.models.llava import FAMILY
from tetrascope.models.weights import Piece
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.llava import CONTENTS, forward_case, name_on_disk, oracle, variants

# Of the largest logit. Both sides sum the same products in fp32 in different orders, through seven blocks: 2e-6 is the
# largest measured. A wrong position, or patches in a wrong order, move logits by a tenth of the largest and more.
BOUND = 1e-5
WRONG = 0.05

KINDS = {"image": 0, "text": 1, "two images": 2, "adjacent images": 3, "image first": 4}


def rows(tensors: dict[str, Tensor], piece: Piece) -> Tensor:
    return tensors[piece.tensor.name].reshape(piece.tensor.matrix)[piece.start : piece.start + piece.rows]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Transformers' model, as a function of a sample, and the case whose weights it has."""

    theirs: Callable[[Document], Tensor]
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
        rows = sum(len(d.ids_T) for d in documents) + pad
        return collate(documents, FAMILY, self.case.config, rows, 1, 0, True, torch.device("cpu")).inputs


@pytest.fixture(scope="module", params=["published", "v2pe"])
def pair(request: pytest.FixtureRequest) -> Pair:
    case = variants()[request.param]
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    forward = forward_case(case)
    return Pair(lambda document: forward(model, document), case)


def error(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    """Largest difference, of the largest logit."""
    assert ours_TV.shape == theirs_TV.shape
    return ((ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_one_sample(pair: Pair, kind: str) -> None:
    document = pair.documents[KINDS[kind]]
    assert error(pair.ours()(pair.inputs((document,))), pair.theirs(document)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("pad", [0, 3])
def test_one_packed_forward_gives_the_logits_of_every_sample(pair: Pair, attention: str, pad: int) -> None:
    logits = pair.ours(attention=attention)(pair.inputs(pair.documents, pad))
    parts = logits.split([*(len(d.ids_T) for d in pair.documents), *([pad] if pad else [])])
    for part, document in zip(parts, pair.documents, strict=False):
        assert error(part, pair.theirs(document)) <= BOUND


@torch.no_grad()
def test_logits_of_a_faint_picture(pair: Pair) -> None:
    # Patches, places and class token a thousand times weaker: only here is the first norm's epsilon more than rounding.
    document = pair.documents[KINDS["two images"]]
    assert document.patches is not None
    names = [name for name in pair.case.weights if "position_embedding" in name or "class_embedding" in name]
    weak = {name: pair.case.weights[name] / 1000 for name in names}
    case = dataclasses.replace(pair.case, weights={**pair.case.weights, **weak})
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    faint = dataclasses.replace(document, patches=document.patches / 1000)
    theirs = forward_case(case)(model, faint)
    assert error(Pair(pair.theirs, case).ours()(pair.inputs((faint,))), theirs) <= BOUND


@torch.no_grad()
def test_the_oracle_would_notice_wrong_positions(pair: Pair) -> None:
    document = pair.documents[KINDS["image"]]
    positions = document.positions_AT.copy()
    positions[0, 14:] += 256  # all text after the image
    wrong = dataclasses.replace(document, positions_AT=positions)
    assert error(pair.ours()(pair.inputs((wrong,))), pair.theirs(document)) > WRONG
    other = "v2pe_fix" if pair.case.config.positions.rule == "default" else "default"
    rule = dataclasses.replace(pair.case.config.positions, rule=other, stride=64)
    config = dataclasses.replace(pair.case.config, positions=rule)
    positions = FAMILY.positions(config, document.ids_T, document.media, (0, 0, 0))
    wrong = dataclasses.replace(document, positions_AT=positions)
    assert error(pair.ours()(pair.inputs((wrong,))), pair.theirs(document)) > WRONG


@torch.no_grad()
def test_the_oracle_would_notice_patches_in_another_order(pair: Pair) -> None:
    document = pair.documents[KINDS["image"]]
    patches = document.patches
    assert patches is not None
    swapped = dataclasses.replace(document, patches=patches[[0, 1, 3, 2, *range(4, 10)]])
    assert error(pair.theirs(swapped), pair.theirs(document)) > WRONG
    assert error(pair.ours()(pair.inputs((swapped,))), pair.theirs(swapped)) <= BOUND
    # The row of the class token holds no pixels: whatever it holds, nothing changes.
    noisy = dataclasses.replace(document, patches=np.concatenate([patches[1:2], patches[1:]]))
    assert torch.equal(pair.ours()(pair.inputs((noisy,))), pair.ours()(pair.inputs((document,))))


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


def test_parameters_that_compute_nothing_get_no_gradient(pair: Pair) -> None:
    model = pair.ours()
    model(pair.inputs(pair.documents)).square().sum().backward()
    idle = {name for name, param in model.named_parameters() if param.grad is None}
    assert idle == {
        name for name, _ in model.named_parameters() if name.startswith(("vision.blocks.2.", "vision.post"))
    }


def test_gradients_reach_the_pixels_of_their_own_document_alone(pair: Pair) -> None:
    inputs = pair.inputs(pair.documents[:3])  # an image, text, two images
    assert inputs.vision is not None
    patches = inputs.vision.patches_NP.requires_grad_()
    logits = pair.ours()(inputs)
    logits[: len(pair.documents[0].ids_T)].square().sum().backward()
    assert patches.grad is not None
    assert patches.grad[1:10].abs().max(dim=1).values.min() > 0
    assert patches.grad[0].abs().max() == 0 and patches.grad[10:].abs().max() == 0
