"""LLaVA-OneVision against transformers' LlavaOnevisionForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import Document
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig, LlavaOneVisionDecoder
from tetrascope.models.llava_onevision.views import video_media
from tetrascope.models.media import DefaultMediaOptions, Media
from tetrascope.tools.verify.case import KEY_BIASES, OPTIMIZER, Case, Numbers, tensor_options, train_reference

WEIGHT_SCALE, VISION_SCALE = 6.0, 1.5
"""Of matrices in the decoder and the adaptor, whose default initialisation leaves attention flat, and in the encoder,
which transformers initialises wider: at 2, attention already magnifies rounding to 8e-6 of a gradient's largest
element. Two places of the encoder's position table swapped then move logits by an eighth of the largest and more, a
position off by one moves them by 6 %; rounding by 2e-6."""

IMAGE, VIDEO, EOS, PAD = range(4)


@dataclass(frozen=True)
class Picture:
    """An image of that many pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class Clip:
    """A video of that many frames."""

    frames: int


CONTENTS: tuple[tuple[int | Picture | Clip, ...], ...] = (
    (5, Picture(30, 14), 9),
    (23,),
    (3, Picture(20, 11), 4, Picture(9, 31), 6),
    (7, Clip(4), 8),
    (Picture(42, 15), 12),
    (17,),
    (4, Picture(12, 40), 2, Clip(3), 5),
    (9, Picture(13, 12), 5),
)
"""Samples of one global batch: numbers of text tokens, images and videos. One view has 3x3 features and a map of more
than two views is shrunk: among these images are such that lose borders, that are shrunk, both and neither."""

UNSUPERVISED = 6
"""The sample with nothing to learn from: where it is a micro-batch of its own, its loss and gradients are zero."""


def tiny_config(tied: bool = False, multi_image: str = "padded", used: int = 3) -> LlavaOneVisionConfig:
    """Five layers, two query heads for each key/value head, a vocabulary that does not divide by two.

    A view has 14 pixels a side, of which three patches of 4 see 12; the final norm, and blocks after the first `used`
    of three, take no part.
    """
    return LlavaOneVisionConfig(
        decoder=LlavaOneVisionDecoder(
            hidden=64, intermediate=96, layers=5, heads=4, kv_heads=2, vocab=251, tied_embeddings=tied
        ),
        vision=ViTShape(
            width=32,
            layers=3,
            heads=2,
            mlp=44,
            image=14,
            patch=4,
            used=used,
            activation="gelu_pytorch_tanh",
            post_norm=True,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        eos_token_id=EOS,
        pad_token_id=PAD,
        pinpoints=tuple((14 * rows, 14 * columns) for rows in range(1, 4) for columns in range(1, 4)),
        max_views=2,
        multi_image=multi_image,
    )


def oracle(config: LlavaOneVisionConfig) -> Any:
    """transformers' model of that shape, eager attention, fp32."""
    from transformers import LlavaOnevisionConfig as HFConfig
    from transformers import LlavaOnevisionForConditionalGeneration

    hf_config = HFConfig.from_dict(FAMILY.to_hf(config, "float32"))
    hf_config._attn_implementation = "eager"
    return LlavaOnevisionForConditionalGeneration(hf_config)


def name_on_disk(name: str) -> str:
    """In-memory parameter name -> name in the hub layout."""
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def make_document(
    config: LlavaOneVisionConfig, content: Sequence[int | Picture | Clip], seed: int, supervise: bool = True
) -> Document:
    """A sample of random text and random pixels; two thirds of its text tokens are supervised, or none."""
    rng = np.random.default_rng(seed)
    processor = FAMILY.media(config, DefaultMediaOptions())
    pictures = sum(isinstance(part, Picture) for part in content)
    ids: list[int] = []
    supervised: list[bool] = []
    shown: list[Media] = []
    for part in content:
        if isinstance(part, int):
            ids += rng.integers(PAD + 1, config.decoder.vocab, part).tolist()
            supervised += (rng.random(part) < 2 / 3).tolist()
            continue
        if isinstance(part, Clip):
            one = video_media(config.vision, tuple(range(part.frames)))
        else:
            one = processor.image(part.width, part.height, pictures)
        ids += [IMAGE if one.kind == "image" else VIDEO] * one.tokens
        supervised += [False] * one.tokens
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


def make_case(seed: int = 0, tied: bool = False, multi_image: str = "padded", used: int = 3, steps: int = 3) -> Case:
    """Scaled random weights and two global batches' worth of samples."""
    config = tiny_config(tied, multi_image, used)
    torch.manual_seed(seed)
    model = oracle(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)  # biases and norms away from zero and one
            elif "embed_tokens" not in name and "position_embedding" not in name:
                param.mul_(VISION_SCALE if "vision_tower" in name else WEIGHT_SCALE)
    weights = {name_on_disk(n): p.detach().clone() for n, p in model.named_parameters()}
    documents = tuple(
        make_document(config, content, seed + i, supervise=i % len(CONTENTS) != UNSUPERVISED)
        for i, content in enumerate(CONTENTS * 2)
    )
    return Case("llava_onevision", config, weights, documents, len(CONTENTS), steps, OPTIMIZER, KEY_BIASES)


def variants() -> dict[str, Case]:
    """The cases of the certificate: a head of its own, as in 7B and 72B, and a tied one, as in 0.5B. Several images of
    a sample are one padded view each, or each an image of its own; then also one block of the encoder is left out."""
    return {"untied": make_case(), "tied": make_case(tied=True, multi_image="anyres", used=2)}


def pixels_of(vision: ViTShape, rows: Tensor) -> Tensor:
    """Patch rows `[n · side², P]` -> pixels `[n, C, image, image]`; those beyond the last whole patch are one."""
    grid = rows.reshape(-1, vision.side, vision.side, vision.channels, vision.patch, vision.patch)
    seen = vision.side * vision.patch
    pixels = torch.ones(len(grid), vision.channels, vision.image, vision.image)
    pixels[:, :, :seen, :seen] = grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, vision.channels, seen, seen)
    return pixels


def forward(model: Any, document: Document, positions: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of one sample. positions `[1, T]`, in tokens, override those of the oracle itself."""
    config = FAMILY.from_hf(model.config.to_dict())
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(document.ids_T)[None]}
    if document.media and document.patches is not None:
        rows = torch.from_numpy(document.patches).split([one.patches for one in document.media])
        pairs = list(zip(document.media, rows, strict=True))
        images = [(one, pixels_of(config.vision, own)) for one, own in pairs if one.kind == "image"]
        videos = [pixels_of(config.vision, own) for one, own in pairs if one.kind == "video"]
        if images:
            inputs["pixel_values"] = torch.cat([pixels for _, pixels in images])
            inputs["image_sizes"] = torch.tensor([one.size[::-1] for one, _ in images])
            if all(len(pixels) == 1 for _, pixels in images):  # the oracle's word for images without crops
                inputs["batch_num_images"] = torch.tensor([len(images)])
        if videos:
            inputs["pixel_values_videos"] = torch.stack(videos)
    if positions is not None:
        inputs["position_ids"] = positions
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # else a gap counts as a border of samples
    logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


def reference(case: Case, batches: Sequence[Sequence[Document]]) -> Numbers:
    """The oracle's losses, gradients and weights."""
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return train_reference(model, forward, batches, case.optimizer, name_on_disk, tensor_options(case))
