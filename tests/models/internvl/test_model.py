"""InternVL gives the logits of its oracles.

With Qwen2 the oracle is transformers' InternVLForConditionalGeneration; with InternLM2, plain and V2PE, a reference
written from the papers' equations (tools/verify/families/internvl_reference.py). Both take one sample at a time,
unpacked and unpadded, in fp32, and share no code with the model. The reference is itself checked against transformers:
InternLM2 computes a Llama, whose weights the `hf` layout gives.
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
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.model import Adaptor
from tetrascope.models.layers.attention import KERNELS, sdpa_attention
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.weights import Piece
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.families.internvl import (
    CONTENTS,
    as_transformers,
    forward,
    name_on_disk,
    oracle,
    reference_model,
    tiny_config,
    variants,
)
from tetrascope.tools.verify.families.internvl_reference import pixel_shuffle

# Of the largest logit. Both sides sum the same products in fp32 in different orders, through five layers: 1.8e-6 is
# the largest measured. A wrong position moves logits by a twentieth of the largest and more.
BOUND = 1e-5

KINDS = {"image": 0, "text": 1, "two images": 2, "video": 3, "many tiles": 4, "image and video": 6}


def rows(tensors: dict[str, Tensor], piece: Piece) -> Tensor:
    return tensors[piece.tensor.name].reshape(piece.tensor.matrix)[piece.start : piece.start + piece.rows]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The oracle and the case whose weights it has."""

    theirs: Any
    case: Case

    @property
    def documents(self) -> tuple[Document, ...]:
        return self.case.documents[: len(CONTENTS)]

    def ours(self, stage: Stage | None = None, attention: str = "sdpa") -> Any:
        """Our model, or a stage of it, with the case's weights: checkpoint tensors stacked as weights.py says."""
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


@pytest.fixture(scope="module", params=["qwen2", "internlm2", "v2pe"])
def pair(request: pytest.FixtureRequest) -> Pair:
    case = variants()[request.param]
    return Pair(reference_model(case), case)


def error(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    assert ours_TV.shape == theirs_TV.shape
    return ((ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max()).item()


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
    # With pixels a thousand times weaker than noise, only the class token and the position table are left to see.
    document = pair.documents[KINDS["many tiles"]]
    assert document.patches is not None
    faint = dataclasses.replace(document, patches=document.patches / 1000)
    assert error(pair.ours()(pair.inputs((faint,))), forward(pair.theirs, faint)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("what", ["tiles swapped", "patches swapped", "stride"])
def test_the_oracle_would_notice(what: str) -> None:
    case = variants()["v2pe"]
    model, document = reference_model(case), case.documents[4]
    right = forward(model, document)
    assert document.patches is not None
    if what == "stride":
        config = dataclasses.replace(case.config, positions=PositionRule("v2pe_fix", 95))
        model = reference_model(dataclasses.replace(case, config=config))
        wrong = forward(model, document)
    else:
        tiles = document.patches.reshape(5, 17, -1).copy()
        if what == "tiles swapped":
            tiles[[0, 1]] = tiles[[1, 0]]
        else:
            tiles[:, [2, 3]] = tiles[:, [3, 2]]
        wrong = forward(model, dataclasses.replace(document, patches=tiles.reshape(document.patches.shape)))
    # Of the largest logit. A stride of 95 instead of 96 shifts the last visual token by a twelfth of a token only.
    assert error(wrong, right) > (100 * BOUND if what == "stride" else 0.05)


@torch.no_grad()
def test_v2pe_differs_from_plain_positions() -> None:
    case = variants()["v2pe"]
    plain = dataclasses.replace(case, config=dataclasses.replace(case.config, positions=PositionRule()))
    models = reference_model(case), reference_model(plain)
    assert torch.equal(forward(models[0], case.documents[1]), forward(models[1], case.documents[1]))  # text only
    assert error(forward(models[0], case.documents[4]), forward(models[1], case.documents[4])) > 0.05


@torch.no_grad()
def test_the_reference_of_internlm2_is_transformers_llama() -> None:
    case = variants()["internlm2"]
    llama, reference = oracle(case.config), reference_model(case)
    weights = as_transformers(case.config, case.weights)
    for name, param in llama.named_parameters():
        param.copy_(weights[name_on_disk(name)])
    for document in case.documents[: len(CONTENTS)]:
        assert error(forward(reference, document), forward(llama, document)) <= BOUND


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
    hidden = None
    for stage in (Stage(range(0, 1), True, False), Stage(range(1, 4), False, False), Stage(range(4, 5), False, True)):
        hidden = pair.ours(stage)(inputs, hidden)
    assert hidden is not None and torch.equal(hidden, pair.ours()(inputs))


def test_stages_hold_their_parameters_under_the_whole_models_names(pair: Pair) -> None:
    whole = {n for n, _ in pair.ours().named_parameters()}
    stages = [Stage(range(0, 2), True, False), Stage(range(2, 5), False, True)]
    parts = [{n for n, _ in pair.ours(stage).named_parameters()} for stage in stages]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]
    assert {name.split(".")[0] for name in whole} == {"vision", "adaptor", "embed", "layers", "norm", "head"}


def test_gradients_reach_the_pixels_of_their_own_document_alone(pair: Pair) -> None:
    inputs = pair.inputs(pair.documents[:3])  # an image, text, two images
    assert inputs.vision is not None
    patches = inputs.vision.patches_NP.requires_grad_()
    logits = pair.ours()(inputs)
    logits[: len(pair.documents[0].ids_T)].square().sum().backward()
    assert patches.grad is not None
    moved = patches.grad.abs().max(dim=1).values
    own = pair.documents[0].media[0].patches
    assert moved[1:own].min() > 0
    assert moved[0] == 0 and moved[own:].max() == 0  # the class token's row is not looked at


def test_pixel_shuffle_is_a_reshape_of_ordered_patches() -> None:
    config = tiny_config()
    adaptor = Adaptor(config)
    adaptor.norm = torch.nn.Identity()  # type: ignore[assignment]
    adaptor.norm.normalized_shape = (config.shuffled_width,)  # type: ignore[assignment]
    adaptor.fc1 = torch.nn.Identity()  # type: ignore[assignment]
    adaptor.fc2 = torch.nn.Identity()  # type: ignore[assignment]
    maps = torch.randn(3, 4, 4, 32)
    order = FAMILY.vision_layout(config, [config.typical]).positions_KN[0, 1:] - 1
    rows = torch.cat([torch.randn(3, 1, 32), maps.flatten(1, 2)[:, order]], dim=1).flatten(0, 1)
    expected = torch.nn.functional.gelu(pixel_shuffle(maps)).flatten(0, 1)
    for padding in (0, 1, 16):  # fewer rows than a tile has
        assert torch.equal(adaptor(torch.cat([rows, torch.randn(padding, 32)])), expected)


def test_models_call_the_kernel_they_are_given(pair: Pair) -> None:
    seen: list[tuple[tuple[int, ...], bool]] = []

    def attend(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, causal: bool) -> Tensor:
        seen.append((packed.lengths, causal))
        return sdpa_attention(q_TND, k_TKD, v_TKD, packed, causal)

    model = FAMILY.build(pair.case.config, Stage(range(2), True, True), attend)
    document = pair.documents[KINDS["video"]]
    model(pair.inputs((document,)))
    assert seen == [((17,) * 6, False)] * 2 + [((len(document.ids_T),), True)] * 2
