"""Qwen2.5-VL gives the logits that transformers' model gives.

The oracle is transformers' Qwen2_5_VLForConditionalGeneration with the same weights, one sample at a time, unpacked and
unpadded, eager attention, fp32; it computes positions and windows for itself and permutes inside the model, where ours
is fed rows that lie window by window. Its matrices are scaled by 6 and the windows are 2 x 2 merged patches, so that a
wrong window, order or position shows (see the tests that make one).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tetrascope.engine.data.collate import collate
from tetrascope.engine.data.document import Document
from tetrascope.models.family import Stage
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.attention import KERNELS, sdpa_attention
from tetrascope.models.layers.packed import Packed
from tetrascope.models.qwen2_5_vl import FAMILY
from tetrascope.models.weights import Piece
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.qwen2_5_vl import CONTENTS, forward, make_case, name_on_disk, oracle

# Of the largest logit. Both sides sum the same products in fp32 in different orders, through five layers: 2e-6 is the
# largest measured. A wrong position or window moves logits by a hundredth of the largest and more.
BOUND = 1e-5

VIDEO_SAMPLE = 3
"""The first sample with a video; its last temporal position is far above its merged rows and columns."""

KINDS = {"image": 0, "text": 1, "two images": 2, "video": VIDEO_SAMPLE, "image and video": 6, "slow video": 7}


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
        rows = sum(len(d.ids_T) for d in documents) + pad
        return collate(documents, FAMILY, self.case.config, rows, 1, 0, True, torch.device("cpu")).inputs


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request: pytest.FixtureRequest) -> Pair:
    case = make_case(tied=request.param == "tied")
    theirs = oracle(case.config)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return Pair(theirs, case)


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


@torch.no_grad()
def test_logits_of_a_faint_picture(pair: Pair) -> None:
    # Patches a thousand times weaker than noise: only here is the vision norms' epsilon more than rounding.
    document = pair.documents[KINDS["two images"]]
    assert document.patches is not None
    faint = dataclasses.replace(document, patches=document.patches / 1000)
    assert_same_logits(pair.ours()(pair.inputs((faint,))), forward(pair.theirs, faint))


@torch.no_grad()
def test_features_of_faint_rows(pair: Pair) -> None:
    # The same for the adaptor's norm, which the encoder's biases keep from ever seeing faint rows.
    rows_NE = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) / 1000
    ours, theirs = pair.ours().adaptor(rows_NE), pair.theirs.model.visual.merger(rows_NE)
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max()


@torch.no_grad()
def test_logits_by_the_rule_of_the_paper(pair: Pair) -> None:
    # The oracle has the other rule built in, so it is given the positions: what remains to compare is how they enter.
    config = dataclasses.replace(pair.case.config, position_rule="paper")
    for number in (VIDEO_SAMPLE, 6):
        document = pair.documents[number]
        positions = FAMILY.positions(config, document.ids_T, document.media, (0, 0, 0))
        inputs = pair.inputs((dataclasses.replace(document, positions_AT=positions),))
        assert_same_logits(pair.ours()(inputs), forward(pair.theirs, document, torch.from_numpy(positions)))


@torch.no_grad()
def test_the_oracle_would_notice_wrong_positions(pair: Pair) -> None:
    document = pair.documents[VIDEO_SAMPLE]
    config = dataclasses.replace(pair.case.config, position_rule="paper")
    slower = dataclasses.replace(config, vision=dataclasses.replace(config.vision, tokens_per_second=1))
    right = forward(pair.theirs, document)
    own = torch.from_numpy(document.positions_AT)
    assert torch.equal(forward(pair.theirs, document, own), right)  # its own rule is the one called hf
    for wrong in (config, slower):
        positions = torch.from_numpy(FAMILY.positions(wrong, document.ids_T, document.media, (0, 0, 0)))
        assert (forward(pair.theirs, document, positions) - right).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"full_attention": (0,)}, {"full_attention": ()}, {"full_attention": (0, 1, 2)}],
    ids=str,
)
def test_the_oracle_would_notice_wrong_windows(pair: Pair, change: dict[str, Any]) -> None:
    config = pair.case.config
    other = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **change))
    document = pair.documents[0]
    wrong = Pair(pair.theirs, dataclasses.replace(pair.case, config=other))
    error = (wrong.ours()(wrong.inputs((document,))) - forward(pair.theirs, document)).abs().max()
    assert error > 1000 * BOUND * forward(pair.theirs, document).abs().max()


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
    stages = [
        Stage(range(0, 1), True, False),
        Stage(range(1, 4), False, False),
        Stage(range(4, 5), False, True),
    ]
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


def test_blocks_attend_inside_windows_or_frames(pair: Pair) -> None:
    seen: list[tuple[tuple[int, ...], bool]] = []

    def attend(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, causal: bool) -> Tensor:
        seen.append((packed.lengths, causal))
        return sdpa_attention(q_TND, k_TKD, v_TKD, packed, causal)

    model = FAMILY.build(pair.case.config, Stage(range(2), True, True), attend)
    model(pair.inputs(pair.documents[VIDEO_SAMPLE : VIDEO_SAMPLE + 1]))
    # Frames of 4 x 6 patches, 2 x 3 merged: a window of 2 x 2 merged patches, and one of 2 x 1 at the edge.
    windows, frames = ((16, 8) * 4, False), ((24,) * 4, False)
    tokens = (len(pair.documents[VIDEO_SAMPLE].ids_T),)
    assert seen == [windows, frames, windows, (tokens, True), (tokens, True)]


def test_the_encoder_needs_its_windows(pair: Pair) -> None:
    inputs = pair.inputs(pair.documents[:1])
    assert inputs.vision is not None
    with pytest.raises(ValueError, match="windows"):
        pair.ours().vision(dataclasses.replace(inputs.vision, windows=None))
