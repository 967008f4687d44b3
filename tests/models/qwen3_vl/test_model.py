"""Qwen3-VL gives the logits that transformers' model gives.

The oracle is transformers' Qwen3VLForConditionalGeneration with the same weights, one sample at a time, unpacked and
unpadded, eager attention, fp32; it shares no code with this package, and computes positions for itself unless a test
passes some. Its matrices are scaled by 6 and its position table to the size of the embedded pixels: a place, a
position or a DeepStack feature that is wrong then moves the logits by far more than rounding (see the tests that
say so).
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
from tetrascope.models.layers.attention import KERNELS
from tetrascope.models.layers.rotary import interleaved_tables
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen3_vl import FAMILY
from tetrascope.models.qwen3_vl.model import first_layers
from tetrascope.models.qwen3_vl.positions import vision_layout
from tetrascope.models.qwen3_vl.vision import PositionTable, table_corners
from tetrascope.models.weights import Piece
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.qwen3_vl import CONTENTS, forward, make_case, name_on_disk, oracle, tiny_config

# Of the largest logit. Both sides sum the same products in fp32 in different orders, through five layers.
BOUND = 1e-5

VIDEO_SAMPLE = 3
"""The first sample with a video; it has more temporal steps than merged rows and columns."""

KINDS = {"image": 0, "text": 1, "two images": 2, "video": VIDEO_SAMPLE, "image and video": 6}


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


def error(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    assert ours_TV.shape == theirs_TV.shape
    return (ours_TV - theirs_TV).abs().max().item() / theirs_TV.abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_one_sample(pair: Pair, kind: str) -> None:
    document = pair.documents[KINDS[kind]]
    assert error(pair.ours()(pair.inputs((document,))), forward(pair.theirs, document)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("pad", [0, 3])
def test_one_packed_forward_gives_the_logits_of_every_sample(pair: Pair, attention: str, pad: int) -> None:
    logits = pair.ours(attention=attention)(pair.inputs(pair.documents, pad))
    parts = logits.split([*(len(d.ids_T) for d in pair.documents), *([pad] if pad else [])])
    for part, document in zip(parts, pair.documents, strict=False):
        assert error(part, forward(pair.theirs, document)) <= BOUND


@torch.no_grad()
def test_logits_of_a_faint_picture(pair: Pair) -> None:
    # Patches a thousand times weaker than noise: the position table alone is left to see.
    document = pair.documents[KINDS["two images"]]
    assert document.patches is not None
    faint = dataclasses.replace(document, patches=document.patches / 1000)
    assert error(pair.ours()(pair.inputs((faint,))), forward(pair.theirs, faint)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_oracle_would_notice_wrong_positions(pair: Pair, kind: str) -> None:
    # Temporal positions of the visual tokens one too high, which the interleaved sections alone tell apart.
    document = pair.documents[KINDS[kind]]
    good = forward(pair.theirs, document)
    positions = torch.from_numpy(document.positions_AT).clone()
    positions[0] += torch.from_numpy((document.ids_T == 0) | (document.ids_T == 1))
    assert error(forward(pair.theirs, document, positions), good) > 1e-2
    given = torch.from_numpy(document.positions_AT)
    assert torch.equal(forward(pair.theirs, document, given), good), "they are the positions it finds for itself"


@torch.no_grad()
def test_the_oracle_would_notice_a_wrong_table_place_and_missing_deepstack(pair: Pair) -> None:
    document = pair.documents[KINDS["image"]]
    good = forward(pair.theirs, document)
    model, inputs = pair.ours(), pair.inputs((document,))
    assert inputs.vision is not None
    moved = inputs.vision.here_KN.clone()
    moved[2] += 1  # a picture taken for one row taller than it is
    vision = dataclasses.replace(inputs.vision, here_KN=moved)
    assert error(model(dataclasses.replace(inputs, vision=vision)), good) > 1e-2
    for merger in model.adaptor.deepstack:
        merger.fc2.weight.zero_()
        merger.fc2.bias.zero_()
        assert error(model(inputs), good) > 1e-2


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
    least = first_layers(pair.case.config)
    assert least == 2
    stages = [
        Stage(range(0, least), True, False),
        Stage(range(least, 4), False, False),
        Stage(range(4, 5), False, True),
    ]
    hidden = None
    for stage in stages:
        hidden = pair.ours(stage)(inputs, hidden)
    assert hidden is not None and torch.equal(hidden, pair.ours()(inputs))


def test_a_stage_with_too_few_layers_for_deepstack_is_refused(pair: Pair) -> None:
    inputs = pair.inputs(pair.documents[:1])
    with pytest.raises(ValueError, match="2 features follow the first layers, 1 are here"):
        pair.ours(Stage(range(1), True, False))(inputs)


def test_stages_hold_their_parameters_under_the_whole_models_names(pair: Pair) -> None:
    whole = {n for n, _ in pair.ours().named_parameters(remove_duplicate=False)}
    stages = [Stage(range(0, 2), True, False), Stage(range(2, 5), False, True)]
    parts = [{n for n, _ in pair.ours(stage).named_parameters()} for stage in stages]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]


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


GRIDS = [(1, 2, 2), (1, 48, 48), (3, 30, 52), (1, 96, 10), (2, 34, 6), (1, 4, 200), (1, 1_000, 2)]


@pytest.mark.parametrize("side", [5, 48])
def test_places_in_the_table_are_transformers_to_the_last_bit(side: int) -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    config = tiny_config()
    layout = vision_layout(config, [media("video", grid, 2) for grid in GRIDS])
    indices, weights = table_corners(layout.positions_KN, side)
    theirs = get_vision_interpolation_indices_and_weights(
        torch.tensor(GRIDS), side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(indices.T, theirs[0]) and torch.equal(weights.T, theirs[1])


def test_the_table_is_resized_bilinearly_with_aligned_corners() -> None:
    # Definition: torch's own interpolation of the table as a picture. An fp32 weight at places up to 6 is good to 5e-7.
    torch.manual_seed(0)
    table = PositionTable(7, 4)
    torch.nn.init.normal_(table.weight)
    picture = table.weight.detach().reshape(1, 7, 7, 4).permute(0, 3, 1, 2)
    for h, w in ((4, 12), (8, 2), (7, 7), (2, 2)):
        plane = torch.tensor([[r, c, h, w] for r in range(h) for c in range(w)]).T
        expected = torch.nn.functional.interpolate(picture, (h, w), mode="bilinear", align_corners=True)
        assert (table(plane) - expected[0].permute(1, 2, 0).reshape(h * w, 4)).abs().max() < 5e-6


def test_rows_of_padding_have_a_place() -> None:
    # Padding rows are all zeros, in a picture of no rows: they must give finite numbers and no gradient of NaN.
    indices, weights = table_corners(torch.zeros((4, 3), dtype=torch.int64), 5)
    assert indices.min() == 0 and indices.max() < 25 and weights.sum(0).tolist() == [1.0] * 3


def test_interleaved_rotary_is_transformers(pair: Pair) -> None:
    rotary = pair.theirs.model.language_model.rotary_emb
    config = pair.case.config
    positions = torch.tensor([[0, 1, 5, 90, 100], [0, 3, 4, 70, 7], [2, 0, 9, 31, 50]])
    cos, sin = rotary(torch.zeros(1), positions[:, None])
    tables = interleaved_tables(positions, config.decoder.head_dim, config.decoder.rope_theta, config.mrope_section)
    # Their angles are fp32: at position 100 good to 100 · 6e-8, and a few units more from the frequency.
    assert (tables.cos_TD - cos[0]).abs().max() < 3e-5 and (tables.sin_TD - sin[0]).abs().max() < 3e-5
