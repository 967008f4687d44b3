"""Qwen2-VL against transformers' Qwen2VLForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import Document
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, Qwen2VLDecoder, Qwen2VLVision, media
from tetrascope.tools.verify.case import OPTIMIZER, Case, Numbers, tensor_options, train_reference

WEIGHT_SCALE = 6.0
IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = range(6)

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


def tiny_config(tied: bool = False, layers: int = 5) -> Qwen2VLConfig:
    """Few layers, two query heads for each key/value head, a vocabulary that does not divide by two."""
    return Qwen2VLConfig(
        decoder=Qwen2VLDecoder(
            hidden=64, intermediate=96, layers=layers, heads=4, kv_heads=2, vocab=251, tied_embeddings=tied
        ),
        vision=Qwen2VLVision(width=32, layers=2, heads=2),
        mrope_section=(2, 3, 3),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        eos_token_id=EOS,
        pad_token_id=PAD,
        position_rule="hf",  # what the oracle computes for itself; the paper's rule has golden tests of its own
    )


def oracle(config: Qwen2VLConfig) -> Any:
    """transformers' model of that shape, eager attention, fp32."""
    from transformers import Qwen2VLConfig as HFConfig
    from transformers import Qwen2VLForConditionalGeneration

    hf_config = HFConfig.from_dict(FAMILY.to_hf(config, "float32"))
    hf_config._attn_implementation = "eager"
    return Qwen2VLForConditionalGeneration(hf_config)


def name_on_disk(name: str) -> str:
    """In-memory parameter name -> name in the hub layout."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def make_document(
    config: Qwen2VLConfig, content: Sequence[int | tuple[int, int, int]], seed: int, supervise: bool = True
) -> Document:
    """A sample of random text and random pixels; two thirds of its text tokens are supervised, or none."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    supervised: list[bool] = []
    shown: list[Media] = []
    for part in content:
        if isinstance(part, int):
            ids += rng.integers(PAD + 1, config.decoder.vocab, part).tolist()
            supervised += (rng.random(part) < 2 / 3).tolist()
        else:
            one = media("image" if part[0] == 1 else "video", part, config.vision.merge)
            ids += [VISION_START, *[IMAGE if one.kind == "image" else VIDEO] * one.tokens, VISION_END]
            supervised += [False] * (one.tokens + 2)
            shown.append(one)
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


def make_case(seed: int = 0, tied: bool = False, steps: int = 3, layers: int = 5, scale: float = WEIGHT_SCALE) -> Case:
    """Scaled random weights and two global batches' worth of samples."""
    config = tiny_config(tied, layers)
    torch.manual_seed(seed)
    model = oracle(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1 and "embed_tokens" not in name:
                param.mul_(scale)
            elif param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)  # biases and norms away from zero and one
    weights = {name_on_disk(n): p.detach().clone() for n, p in model.named_parameters()}
    documents = tuple(
        make_document(config, content, seed + i, supervise=i % len(CONTENTS) != UNSUPERVISED)
        for i, content in enumerate(CONTENTS * 2)
    )
    return Case("qwen2_vl", config, weights, documents, len(CONTENTS), steps, OPTIMIZER)


def variants() -> dict[str, Case]:
    """The cases of the certificate: an output head of its own, as in 7B and 72B, and a tied one, as in 2B."""
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
