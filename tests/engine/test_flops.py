"""FLOP counts against torch's own counter, on a small Qwen2-VL in one process.

The counter sees every matrix product that runs and knows its shape; the formulas know shapes only. They may be asked
to agree exactly because the attention kernel here computes the attended pairs and no others, one query row at a time
(the real kernels also compute masked pairs, or recompute scores, which is no work of the model). Widths that may
differ do, as do the numbers of layers, so that one taken for another shows, and whole numbers leave no tolerance for a
missing term to hide in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tetrascope.engine import flops
from tetrascope.engine.data.collate import collate
from tetrascope.engine.modules import Trained
from tetrascope.models.family import Stage
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.attention import reference_attention
from tetrascope.models.layers.packed import Packed
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.tools.verify.families.qwen2_vl import make_document, tiny_config

CONTENTS: tuple[tuple[int | tuple[int, int, int], ...], ...] = (
    (3, (1, 2, 2), 4, (1, 4, 6), 2),
    (9,),
    (5, (3, 2, 4), 2),
)
"""Two images, none, and a video of three frames."""


def attended_pairs(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, causal: bool) -> Tensor:
    """Attention with one product for each query row and the keys it sees."""
    groups = q_TND.shape[1] // k_TKD.shape[1]
    q_TN1D = q_TND[:, :, None]
    k_NTD, v_NTD = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k_TKD, v_TKD))
    rows = []
    for start, length in zip(packed.offsets, packed.lengths, strict=False):
        for row in range(start, start + length):
            seen = slice(start, row + 1 if causal else start + length)
            scores = torch.bmm(q_TN1D[row], k_NTD[:, seen].transpose(1, 2)) / q_TND.shape[-1] ** 0.5
            rows.append(torch.bmm(scores.softmax(-1), v_NTD[:, seen])[:, 0])
    return torch.stack(rows)


@dataclass(frozen=True)
class Problem:
    """A model, a packed micro-batch of all samples, and the lengths that the formulas are given."""

    config: Qwen2VLConfig
    model: nn.Module
    inputs: Inputs
    media: list[Media]
    documents: list[int]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    config = tiny_config(tied=request.param)
    # As it is, the vision MLP would be as wide as a merged block, and the encoder as the decoder's keys.
    vision = replace(config.vision, width=40, mlp_ratio=3, layers=2)
    config = replace(config, vision=vision, decoder=replace(config.decoder, layers=3))
    torch.manual_seed(0)
    model = FAMILY.build(config, Stage(range(3), first=True, last=True), attended_pairs)
    samples = [make_document(config, content, seed) for seed, content in enumerate(CONTENTS)]
    documents = [len(sample.ids_T) for sample in samples]
    batch = collate(samples, FAMILY, config, sum(documents), 1, 0, True, torch.device("cpu"))
    media = [one for sample in samples for one in sample.media]
    yield Problem(config, model, batch.inputs, media, documents)


def test_the_counted_kernel_is_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    for causal in (False, True):
        expected = reference_attention(q, k, v, Packed((4, 5)), causal)
        torch.testing.assert_close(attended_pairs(q, k, v, Packed((4, 5)), causal), expected)


def test_forward_counts_every_product(problem: Problem) -> None:
    with FlopCounterMode(display=False, depth=4) as counter, torch.no_grad():
        problem.model(problem.inputs)
    counted = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    config, media, documents = problem.config, problem.media, problem.documents
    assert counted["Qwen2VL.vision"] + counted["Qwen2VL.adaptor"] == flops.vision_forward(config, media)
    for layer in range(config.decoder.layers):
        assert counted[f"Qwen2VL.layers.{layer}"] == flops.layer_forward(config, documents)
    assert counted["Qwen2VL.head"] == flops.head_forward(config, sum(documents))
    whole = flops.vision_forward(config, media) + flops.language_forward(config, documents)
    assert counter.get_total_flops() == whole


def test_a_kernel_that_masks_computes_the_other_half_in_vain(problem: Problem) -> None:
    """The reference kernel does all L² pairs of a causal document: the excess is the L·(L−1)/2 masked ones."""
    config = problem.config
    model = FAMILY.build(config, Stage(range(3), first=True, last=True), reference_attention)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(problem.inputs)
    counted = counter.get_total_flops()
    needed = flops.vision_forward(config, problem.media) + flops.language_forward(config, problem.documents)
    masked = sum(n * (n - 1) // 2 for n in problem.documents)
    assert counted - needed == 4 * config.decoder.layers * config.decoder.hidden * masked


@pytest.mark.parametrize(
    ("vision", "language"), [(True, True), (False, True), (True, False)], ids=["both", "language", "vision"]
)
def test_training_counts_every_product_of_the_backward(problem: Problem, vision: bool, language: bool) -> None:
    encoder, adaptor = problem.model.get_submodule("vision"), problem.model.get_submodule("adaptor")
    for parameter in problem.model.parameters():
        parameter.requires_grad_(language)
    for parameter in (*encoder.parameters(), *adaptor.parameters()):
        parameter.requires_grad_(vision)
    with FlopCounterMode(display=False) as counter:
        features = adaptor(encoder(problem.inputs.vision))
        vision_forward = counter.get_total_flops()
        if vision:
            features.backward(torch.ones_like(features))
        vision_all = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits = problem.model(problem.inputs)
        logits.backward(torch.ones_like(logits))
    whole = counter.get_total_flops()
    learning = Trained(vision, vision, language, language)
    expected = flops.training_flops(problem.config, problem.media, problem.documents, learning)
    assert (vision_all, whole - vision_all) == expected
    assert vision_forward == flops.vision_forward(problem.config, problem.media)


def test_nothing_trained_is_forward_only(problem: Problem) -> None:
    config, media, documents = problem.config, problem.media, problem.documents
    forward = (flops.vision_forward(config, media), flops.language_forward(config, documents))
    assert flops.training_flops(config, media, documents, Trained(False, False, False, False)) == forward


def test_everything_trained_is_three_times_forward_but_for_the_pixels_gradient(problem: Problem) -> None:
    config, media, documents = problem.config, problem.media, problem.documents
    vision, language = flops.training_flops(config, media, documents)
    embedding = 2 * sum(one.patches for one in media) * config.vision.patch_width * config.vision.width
    assert vision == 3 * flops.vision_forward(config, media) - embedding
    assert language == 3 * flops.language_forward(config, documents)


def test_without_images_there_is_no_vision(problem: Problem) -> None:
    assert flops.vision_forward(problem.config, []) == 0
    assert flops.training_flops(problem.config, [], [7])[0] == 0
