"""Qwen3-VL against transformers' Qwen3VLForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import Document
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen3_vl import FAMILY
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig, Qwen3VLDecoder, Qwen3VLVision
from tetrascope.tools.verify.case import OPTIMIZER, Case, Numbers, tensor_options, train_reference

WEIGHT_SCALE = 6.0
IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = range(6)

TIME_TOKENS = 2
"""Text tokens before each temporal step of a video, where its time stands."""

CONTENTS: tuple[tuple[int | tuple[int, int, int], ...], ...] = (
    (5, (1, 4, 6), 9),
    (23,),
    (3, (1, 2, 2), 4, (1, 8, 4), 6),
    (7, (4, 4, 4), 8),
    ((1, 6, 6), 12),
    (17,),
    (4, (1, 2, 8), 2, (3, 2, 2), 5),
    (9, (1, 4, 6), 5),
)
"""Samples of one global batch: numbers of text tokens and grids (t, h, w), an image or, with t > 1, a video."""

UNSUPERVISED = 6
"""The sample with nothing to learn from: where it is a micro-batch of its own, its loss and gradients are zero."""


def tiny_config(tied: bool = False) -> Qwen3VLConfig:
    """Heads wider than hidden / heads, as in the published 32B; MLPs and a vocabulary that do not divide evenly.

    DeepStack feeds two of the five decoder layers, so that four pipeline stages still fit; the last vision block is
    not tapped. The position table has 5 rows, smaller than some pictures and larger than others.
    """
    return Qwen3VLConfig(
        decoder=Qwen3VLDecoder(
            hidden=64, intermediate=96, layers=5, heads=4, kv_heads=2, vocab=251, tied_embeddings=tied, head_dim=24
        ),
        vision=Qwen3VLVision(width=32, layers=3, heads=2, mlp=45, deepstack=(0, 1), table_side=5),
        mrope_section=(6, 3, 3),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def oracle(config: Qwen3VLConfig) -> Any:
    """transformers' model of that shape, eager attention, fp32."""
    from transformers import Qwen3VLConfig as HFConfig
    from transformers import Qwen3VLForConditionalGeneration

    hf_config = HFConfig.from_dict(FAMILY.to_hf(config, "float32"))
    hf_config._attn_implementation = "eager"
    return Qwen3VLForConditionalGeneration(hf_config)


def name_on_disk(name: str) -> str:
    """Names in memory and on disk are the same."""
    return name


def make_document(
    config: Qwen3VLConfig, content: Sequence[int | tuple[int, int, int]], seed: int, supervise: bool = True
) -> Document:
    """A sample of random text and random pixels; two thirds of its text tokens are supervised, or none."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    supervised: list[bool] = []
    shown: list[Media] = []

    def text(count: int) -> list[int]:
        return rng.integers(PAD + 1, config.decoder.vocab, count).tolist()

    for part in content:
        if isinstance(part, int):
            ids += text(part)
            supervised += (rng.random(part) < 2 / 3).tolist()
            continue
        one = media("image" if part[0] == 1 else "video", part, config.vision.merge)
        shown.append(one)
        for _ in range(part[0]):
            ids += text(TIME_TOKENS) if one.kind == "video" else []
            ids += [VISION_START, *[IMAGE if one.kind == "image" else VIDEO] * (one.tokens // part[0]), VISION_END]
        supervised += [False] * (len(ids) - len(supervised))
    patches = rng.standard_normal((sum(one.patches for one in shown), config.vision.patch_width), dtype=np.float32)
    ids_T = np.array(ids, dtype=np.int64)
    supervised[-1] = True  # at least one, however short the text
    return Document(
        ids_T=ids_T,
        positions_AT=FAMILY.positions(config, ids_T, shown, (seed, 0, 0)),
        weights_T=np.array(supervised, dtype=np.float32) * supervise,
        media=tuple(shown),
        patches=patches,
    )


def make_case(seed: int = 0, tied: bool = False, steps: int = 3) -> Case:
    """Scaled random weights and two global batches' worth of samples."""
    config = tiny_config(tied)
    torch.manual_seed(seed)
    model = oracle(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "pos_embed" in name:
                param.normal_()  # as large as the embedded pixels, so that a wrong place in the table shows
            elif param.ndim > 1 and "embed_tokens" not in name:
                param.mul_(WEIGHT_SCALE)
            elif param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)  # biases and norms away from zero and one
    weights = {name_on_disk(n): p.detach().clone() for n, p in model.named_parameters()}
    documents = tuple(
        make_document(config, content, seed + i, supervise=i % len(CONTENTS) != UNSUPERVISED)
        for i, content in enumerate(CONTENTS * 2)
    )
    return Case("qwen3_vl", config, weights, documents, len(CONTENTS), steps, OPTIMIZER)


def variants() -> dict[str, Case]:
    """The cases of the certificate: an output head of its own, as in 8B and 32B, and a tied one, as in 2B and 4B."""
    return {"untied": make_case(), "tied": make_case(tied=True)}


def forward(model: Any, document: Document, positions: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of one sample. positions int64 `[3, T]` override those that the oracle computes for itself."""
    ids = torch.from_numpy(document.ids_T)[None]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": kinds}
    patches = torch.from_numpy(document.patches) if document.patches is not None else torch.empty(0)
    rows = [one.patches for one in document.media]
    split = list(patches.split(rows)) if rows else []
    for field in ("image", "video"):
        chosen = [i for i, one in enumerate(document.media) if one.kind == field]
        if chosen:
            pixels = "pixel_values_videos" if field == "video" else "pixel_values"
            inputs[pixels] = torch.cat([split[i] for i in chosen])
            inputs[f"{field}_grid_thw"] = torch.tensor([document.media[i].grid for i in chosen])
    if positions is not None:
        inputs["position_ids"] = positions[:, None]
    model.model.rope_deltas = None  # cached from the call before
    logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


def reference(case: Case, batches: Sequence[Sequence[Document]]) -> Numbers:
    """The oracle's losses, gradients and weights."""
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return train_reference(model, forward, batches, case.optimizer, name_on_disk, tensor_options(case))
