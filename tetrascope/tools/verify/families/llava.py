"""LLaVA-1.5 against transformers' LlavaForConditionalGeneration.

Matrices are scaled up, since default-initialised attention is flat and blind to positions: the decoder's by 6, those of
CLIP and projector by 2, since at 6 the attention of one after the other magnifies rounding to more than 1e-5 of the
largest logit; at 2 it stays below 2e-6. CLIP's position table is scaled by 20, or it would drown in the embedded
pixels. Two swapped patches then move logits by a third of the largest and more, a position off by one by a tenth and
more (measured over three seeds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import Document
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.llava import FAMILY
from tetrascope.models.llava.config import LlavaConfig, LlavaDecoder, LlavaVision, media
from tetrascope.tools.verify.case import KEY_BIASES, OPTIMIZER, Case, Numbers, tensor_options, train_reference

LANGUAGE_SCALE, VISION_SCALE, PLACE_SCALE = 6.0, 2.0, 20.0
IMAGE, BOS, EOS, PAD = range(4)
SHOWN = "image"

CONTENTS: tuple[tuple[int | str, ...], ...] = (
    (5, SHOWN, 9),
    (23,),
    (3, SHOWN, 4, SHOWN, 6),
    (7, SHOWN, SHOWN, SHOWN, 8),
    (SHOWN, 12),
    (17,),
    (4, SHOWN, 2, SHOWN, 5),
    (9, SHOWN, 5),
)
"""Samples of one global batch: numbers of text tokens, and images. All images have one size in LLaVA-1.5."""

UNSUPERVISED = 6
"""The sample with nothing to learn from: where it is a micro-batch of its own, its loss and gradients are zero."""

V2PE_STRIDE = 64
"""A quarter of a token between two visual tokens: nine of an image end inside a token, which text rounds up."""


def tiny_config(rule: PositionRule = PositionRule(), tied: bool = False) -> LlavaConfig:
    """Five layers, two query heads for each key/value head, a vocabulary that does not divide by two; 9 + 1 rows of an
    image, which tensor parallelism cuts in the middle."""
    return LlavaConfig(
        decoder=LlavaDecoder(
            hidden=64, intermediate=96, layers=5, heads=4, kv_heads=2, vocab=251, tied_embeddings=tied
        ),
        vision=LlavaVision(width=32, layers=3, heads=2, mlp=64, image=42),
        image_token_id=IMAGE,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        positions=rule,
    )


def oracle(config: LlavaConfig) -> Any:
    """transformers' model of that shape, eager attention, fp32."""
    from transformers import LlavaConfig as HFConfig
    from transformers import LlavaForConditionalGeneration

    hf_config = HFConfig.from_dict(FAMILY.to_hf(config, "float32"))
    hf_config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(hf_config)


def name_on_disk(name: str) -> str:
    """In-memory parameter name -> name in the hub layout."""
    for theirs, disk in (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(theirs):
            return disk + name.removeprefix(theirs)
    return name


def make_document(config: LlavaConfig, content: Sequence[int | str], seed: int, supervise: bool = True) -> Document:
    """A sample of random text and random pixels; two thirds of its text tokens are supervised, or none."""
    rng = np.random.default_rng(seed)
    one, v = media(config.vision, (42, 42)), config.vision
    ids: list[int] = []
    supervised: list[bool] = []
    patches = [np.zeros((0, v.patch_width), dtype=np.float32)]
    for part in content:
        if isinstance(part, int):
            ids += rng.integers(PAD + 1, config.decoder.vocab, part).tolist()
            supervised += (rng.random(part) < 2 / 3).tolist()
        else:
            ids += [IMAGE] * one.tokens
            supervised += [False] * one.tokens
            pixels = rng.standard_normal((v.side**2, v.patch_width), dtype=np.float32)
            patches += [np.zeros((1, v.patch_width), dtype=np.float32), pixels]
    shown = tuple(one for part in content if part == SHOWN)
    ids_T = np.array(ids, dtype=np.int64)
    supervised[-1] = True  # at least one, however short the text
    return Document(
        ids_T=ids_T,
        positions_AT=FAMILY.positions(config, ids_T, shown, (seed, 0, 0)),
        weights_T=np.array(supervised, dtype=np.float32) * supervise,
        media=shown,
        patches=np.concatenate(patches),
    )


def make_case(seed: int = 0, rule: PositionRule = PositionRule(), tied: bool = False, steps: int = 3) -> Case:
    """Scaled random weights and two global batches' worth of samples."""
    config = tiny_config(rule, tied)
    torch.manual_seed(seed)
    model = oracle(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)  # biases, norms, class token: away from zero and one
            elif "embed_tokens" not in name:
                param.mul_(_scale(name))
    weights = {name_on_disk(n): p.detach().clone() for n, p in model.named_parameters()}
    documents = tuple(
        make_document(config, content, seed + i, supervise=i % len(CONTENTS) != UNSUPERVISED)
        for i, content in enumerate(CONTENTS * 2)
    )
    return Case("llava", config, weights, documents, len(CONTENTS), steps, OPTIMIZER, KEY_BIASES)


def _scale(name: str) -> float:
    if "position_embedding" in name:
        return PLACE_SCALE
    return VISION_SCALE if "vision_tower" in name or "projector" in name else LANGUAGE_SCALE


def variants() -> dict[str, Case]:
    """The cases of the certificate: positions as published, and V2PE's, with fractions of a token."""
    return {"published": make_case(), "v2pe": make_case(rule=PositionRule("v2pe_fix", V2PE_STRIDE))}


def v2pe_positions(ids_T: np.ndarray, tokens: int, step: float) -> Tensor:
    """Position ids float32 `[T]`, one token after another (arXiv 2412.09616, eq. 4): text one further than the token
    before it, an image's tokens `step` further; after an image of `tokens` tokens, on from the next whole number."""
    positions: list[float] = []
    last, run = -1.0, 0
    for token in ids_T.tolist():
        last = last + step if token == IMAGE else last + 1.0
        positions.append(last)
        run = run + 1 if token == IMAGE else 0
        if run == tokens:
            last, run = float(np.ceil(last)), 0
    return torch.tensor(positions, dtype=torch.float32)


def pixel_values(patches: np.ndarray, config: LlavaConfig) -> Tensor:
    """Rows of patches `[n·rows, C·p·p]` back to pictures `[n, C, H, W]`, without the class tokens' rows."""
    v = config.vision
    rows = torch.from_numpy(patches).view(-1, v.rows, v.channels, v.patch, v.patch)[:, 1:]
    grid = rows.unflatten(1, (v.side, v.side)).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, v.channels, v.image, v.image)


def forward(model: Any, document: Document, config: LlavaConfig, positions_T: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of one sample. positions `[T]` override those that the oracle computes for itself."""
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(document.ids_T)[None]}
    if document.media and document.patches is not None:
        inputs["pixel_values"] = pixel_values(document.patches, config)
    if positions_T is not None:
        # With a mask given, transformers does not take a step other than 1 for the border of a packed sample.
        inputs |= {"position_ids": positions_T[None], "attention_mask": torch.ones_like(inputs["input_ids"])}
    logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


def forward_case(case: Case) -> Any:
    """`forward` with the positions of the case's rule: (model, document) -> logits."""
    rule: PositionRule = case.config.positions
    tokens: int = case.config.vision.side**2
    if rule.rule == "default":
        return lambda model, document: forward(model, document, case.config)
    return lambda model, document: forward(
        model, document, case.config, v2pe_positions(document.ids_T, tokens, rule.stride / 256)
    )


def reference(case: Case, batches: Sequence[Sequence[Document]]) -> Numbers:
    """The oracle's losses, gradients and weights."""
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return train_reference(model, forward_case(case), batches, case.optimizer, name_on_disk, tensor_options(case))
