"""FLOP counts of every family, against torch's own counter and against sums by hand at the published sizes.

test_flops.py shows on one family why exact agreement may be asked for. Here every family's own samples (images, videos,
windows, class tokens, tokens that are dropped or pooled) go through its own model.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.test_flops import attended_pairs
from tetrascope.engine import flops
from tetrascope.engine.data.collate import collate
from tetrascope.engine.modules import Trained
from tetrascope.models.family import FAMILIES, Stage, get_family
from tetrascope.models.layers.packed import Packed
from tetrascope.models.media import Media
from tetrascope.tools.verify.families import get_oracle

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_forward_counts_every_product(name: str) -> None:
    family, case = get_family(name), next(iter(get_oracle(name).variants().values()))
    config, documents = case.config, case.documents[: case.batch]
    model = family.build(config, Stage(range(config.decoder.layers), first=True, last=True), attended_pairs)
    lengths = [len(d.ids_T) for d in documents]
    inputs = collate(documents, family, config, sum(lengths), 1, 0, True, CPU).inputs
    media = [one for d in documents for one in d.media]
    with FlopCounterMode(display=False, depth=2) as counter, torch.no_grad():
        model(inputs)
    counted = {part: sum(by_operator.values()) for part, by_operator in counter.get_flop_counts().items()}
    of_vision = sum(n for part, n in counted.items() if part.split(".")[1:] in (["vision"], ["adaptor"]))
    assert of_vision == flops.vision_forward(config, media)
    assert counter.get_total_flops() == of_vision + flops.language_forward(config, lengths)


def test_windows_and_frames_are_what_attention_sees() -> None:
    """The lengths that costs are computed from are the ones that the kernels are given."""
    for name in sorted(FAMILIES):
        family, case = get_family(name), next(iter(get_oracle(name).variants().values()))
        seen: list[Packed] = []

        def attend(q, k, v, packed, causal):  # type: ignore[no-untyped-def]
            seen.append(packed)  # noqa: B023
            return q

        documents = case.documents[: case.batch]
        media = [one for d in documents for one in d.media]
        rows = sum(len(d.ids_T) for d in documents)
        inputs = collate(documents, family, case.config, rows, 1, 0, True, CPU).inputs
        model = family.build(case.config, Stage(range(case.config.decoder.layers), first=True, last=True), attend)
        with torch.no_grad():
            model(inputs)
        frames = tuple(n for one in media for n in one.frames)
        windows = tuple(n for one in media for n in one.windows)
        assert {packed.lengths for packed in seen[: -case.config.decoder.layers]} <= {frames, windows}


# Qwen2-VL 7B by hand. A token: in each of 28 layers 2·3584·(3584 + 512 + 512 + 3584) = 58,720,256 for query, key, value
# and output and 2·3·3584·18944 = 407,371,776 for the MLP; 2·3584·152064 = 1,089,994,752 for the head: 14.14 GFLOP.
# A patch: 2·1176·1280 to embed it, in each of 32 blocks 2·(4·1280² + 2·1280·5120). A merged feature:
# 2·5120·(5120 + 3584).
QWEN2_VL_7B_TOKEN = 28 * (2 * 3584 * (3584 + 512 + 512 + 3584) + 6 * 3584 * 18944) + 2 * 3584 * 152064
QWEN2_VL_7B_PATCH = 2 * 1176 * 1280 + 32 * 2 * (4 * 1280**2 + 2 * 1280 * 5120)
QWEN2_VL_7B_FEATURE = 2 * 5120 * (5120 + 3584)


@pytest.mark.parametrize(
    ("learning", "token_factors", "vision_factors"),
    [
        # Forward, weight gradients, input gradients: of linears; of the patch embedding, the blocks and the adaptor.
        (Trained(vision=True, adaptor=True, language=True, embeddings=True), (3, 3), (2, 3, 3)),
        (Trained(vision=False, adaptor=True, language=True, embeddings=True), (3, 3), (1, 1, 2)),
        (Trained(vision=True, adaptor=True, language=False, embeddings=False), (2, 3), (2, 3, 3)),
        (Trained(vision=False, adaptor=True, language=False, embeddings=False), (2, 3), (1, 1, 2)),
    ],
    ids=["all", "vision frozen", "language frozen", "adaptor only"],
)
def test_published_size_by_hand(
    learning: Trained, token_factors: tuple[int, int], vision_factors: tuple[int, int, int]
) -> None:
    config = get_family("qwen2_vl").presets["7b"]()
    image = Media("image", (1, 16, 16), (256,), 64, 64)
    vision, language = flops.training_flops(config, [image], [1000], learning)
    attention = 28 * 4 * 3584 * (1000 * 1001 // 2)
    assert language == token_factors[0] * 1000 * QWEN2_VL_7B_TOKEN + token_factors[1] * attention
    embedding, blocks, adaptor = vision_factors
    pairs = 32 * 4 * 1280 * 256**2
    assert vision == (
        embedding * 256 * 2 * 1176 * 1280
        + blocks * (256 * (QWEN2_VL_7B_PATCH - 2 * 1176 * 1280) + pairs)
        + adaptor * 64 * QWEN2_VL_7B_FEATURE
    )
