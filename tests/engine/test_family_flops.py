"""FLOP counts of every family, against torch's own counter and against sums by hand at the published sizes.

test_flops.py shows on one family why exact agreement may be asked for. Here every family's own samples (images, videos,
windows, class tokens, tokens that are dropped or pooled) go through its own model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.engine.test_flops import attended_pairs
from tetrascope.engine import flops
from tetrascope.engine.config import DataSection
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


def decoder(layers: int, hidden: int, kv: int, mlp: int, vocab: int, heads: int | None = None) -> int:
    """FLOP of a token outside attention. heads: width of all query heads together, if not hidden; kv: of the others."""
    q = heads or hidden
    return 2 * (layers * (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * mlp) + hidden * vocab)


def encoder(rows: int, patch: int, blocks: int, width: int, mlp: int) -> int:
    """FLOP of one picture in a plain vision transformer without its adaptor; every row attends to every row."""
    return rows * 2 * (patch * width + blocks * (4 * width**2 + 2 * width * mlp)) + blocks * 4 * width * rows**2


def two_layers(rows: int, width: int, middle: int, hidden: int) -> int:
    return rows * 2 * (width * middle + middle * hidden)


# Family and size, a picture, FLOP of it, FLOP of a token outside attention, layers x width of all query heads.
PUBLISHED = {
    # CLIP ViT-L/14: 577 rows of 588 numbers, 23 of 24 blocks; Vicuna-7B.
    ("llava", "7b"): (
        encoder(577, 588, 23, 1024, 4096) + two_layers(577, 1024, 4096, 4096),
        decoder(32, 4096, 4096, 11008, 32064),
        32 * 4096,
    ),
    # SigLIP so400m without its last block, two views (the whole picture, one crop of 384 x 384); Qwen2-7B.
    ("llava_onevision", "7b"): (
        2 * (encoder(729, 588, 26, 1152, 4304) + two_layers(729, 1152, 3584, 3584)),
        decoder(28, 3584, 512, 18944, 152128),
        28 * 3584,
    ),
    # InternViT-300M, one tile, 256 features of four patches; InternLM2-1.8B.
    ("internvl", "internvl2-2b"): (
        encoder(1025, 588, 24, 1024, 4096) + two_layers(256, 4096, 2048, 2048),
        decoder(24, 2048, 1024, 8192, 92553),
        24 * 2048,
    ),
    # SigLIP so400m up to the block before the last, 14 x 14 features of four patches; Qwen2-7B.
    ("longvila", "7b"): (
        encoder(729, 588, 26, 1152, 4304) + two_layers(196, 4608, 3584, 3584),
        decoder(28, 3584, 512, 18944, 152064),
        28 * 3584,
    ),
    # 384 x 384 pixels are 24 x 24 patches of 3·2·16·16 numbers; four mergers; Qwen3-8B.
    ("qwen3_vl", "8b"): (
        encoder(576, 1536, 27, 1152, 4304) + 4 * two_layers(144, 4608, 4608, 4096),
        decoder(36, 4096, 1024, 12288, 151936),
        36 * 4096,
    ),
    # 392 x 392 pixels are 28 x 28 patches; SwiGLU of 3420; 4 blocks see all, 28 see windows of 8 or 4 patches a side,
    # nine times 64, six times 32 and once 16 rows.
    ("qwen2_5_vl", "7b"): (
        784 * 2 * (1176 * 1280 + 32 * (4 * 1280**2 + 3 * 1280 * 3420))
        + 4 * 1280 * (4 * 784**2 + 28 * (9 * 64**2 + 6 * 32**2 + 16**2))
        + two_layers(196, 5120, 5120, 3584),
        decoder(28, 3584, 512, 18944, 152064),
        28 * 3584,
    ),
}


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_forward_of_other_published_sizes_by_hand(name: str, size: str) -> None:
    family = get_family(name)
    config = family.presets[size]()
    side = 392 if name == "qwen2_5_vl" else 384
    picture = family.media(config, DataSection(train=Path("x"), tokenizer=Path("x"))).image(side, side, 1)
    of_picture, of_token, width = PUBLISHED[name, size]
    assert flops.vision_forward(config, [picture]) == of_picture
    # A token sees itself and those before it: 4 FLOP a pair for each number of a query.
    assert flops.language_forward(config, [1000]) == 1000 * of_token + 4 * width * (1000 * 1001 // 2)
