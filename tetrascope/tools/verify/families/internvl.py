"""InternVL: with Qwen2 against transformers' InternVLForConditionalGeneration, with InternLM2 against a reference.

transformers has no InternLM2 and no V2PE, so internvl_reference.py computes both from the papers' equations. What the
two oracles share (encoder, pixel shuffle, adaptor) is thereby checked against transformers and against the equations.

Tiles have 4 x 4 patches, hence 4 visual tokens. Matrices are scaled as in the case of Qwen2-VL, those of the encoder
more; besides, position table and class token matter beside the patches, and LayerScale does not hide the branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import Document
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.config import InternViTShape, InternVLConfig, InternVLDecoder, framed, tiled
from tetrascope.models.internvl.hf_config import to_transformers
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.media import Media
from tetrascope.models.weights import WeightMap, logical_tensors, relative, rename
from tetrascope.tools.verify.case import OPTIMIZER, Case, Numbers, tensor_options, train_reference
from tetrascope.tools.verify.families.internvl_reference import Reference

WEIGHT_SCALE = 6.0
IMAGE, IMAGE_START, IMAGE_END, LINE, EOS, PAD = range(6)


@dataclass(frozen=True)
class Picture:
    """A picture cut into a grid of tiles; a thumbnail follows where there is more than one."""

    columns: int
    rows: int


@dataclass(frozen=True)
class Video:
    """A video of so many frames, a tile each."""

    frames: int


Content = tuple[int | Picture | Video, ...]

CONTENTS: tuple[Content, ...] = (
    (5, Picture(1, 1), 9),
    (23,),
    (3, Picture(2, 1), 4, Picture(1, 1), 6),
    (7, Video(6), 8),
    (Picture(2, 2), 12),
    (17,),
    (4, Picture(1, 2), 2, Video(2), 5),
    (9, Picture(1, 1), 5),
)
"""Samples of one global batch: numbers of text tokens, pictures and videos."""

UNSUPERVISED = 6
"""The sample with nothing to learn from: where it is a micro-batch of its own, its loss and gradients are zero."""


def tiny_config(kind: str = "qwen2", positions: PositionRule | None = None, tied: bool = False) -> InternVLConfig:
    """Five layers, two query heads for each key/value head, a vocabulary that does not divide by two."""
    return InternVLConfig(
        decoder=InternVLDecoder(
            hidden=64,
            intermediate=96,
            layers=5,
            heads=4,
            kv_heads=2,
            vocab=251,
            qkv_bias=kind == "qwen2",
            tied_embeddings=tied,
            kind=kind,
        ),
        vision=InternViTShape(width=32, layers=2, heads=2, mlp=64, image=56),
        image_token_id=IMAGE,
        eos_token_id=EOS,
        pad_token_id=PAD,
        positions=positions or PositionRule(),
        rope_scaling_factor=2.0,
    )


def oracle(config: InternVLConfig) -> Any:
    """transformers' model of that shape (InternLM2 as the Llama that it is), eager attention, fp32."""
    from transformers import InternVLConfig as HFConfig
    from transformers import InternVLForConditionalGeneration

    hf_config = HFConfig.from_dict(to_transformers(config, "float32"))
    hf_config._attn_implementation = "eager"
    return InternVLForConditionalGeneration(hf_config)


IN_MEMORY = (
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.(?=vision_tower|multi_modal)", ""),
)


def name_on_disk(name: str) -> str:
    """transformers' in-memory parameter name -> name in the files that it writes."""
    return rename(name, IN_MEMORY)


def make_document(config: InternVLConfig, content: Content, seed: int, supervise: bool = True) -> Document:
    """A sample of random text and random pixels; two thirds of its text tokens are supervised, or none."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    supervised: list[bool] = []
    shown: list[Media] = []
    for part in content:
        if isinstance(part, int):
            ids += rng.integers(PAD + 1, config.decoder.vocab, part).tolist()
            supervised += (rng.random(part) < 2 / 3).tolist()
            continue
        if isinstance(part, Picture):
            tiles = part.columns * part.rows
            shown.append(tiled(config, (part.columns, part.rows, 12), tiles + (tiles > 1)))
            added = [IMAGE_START, *[IMAGE] * shown[-1].tokens, IMAGE_END, LINE]
        else:
            shown.append(framed(config, part.frames))
            added = []
            for frame in range(part.frames):
                added += [PAD + 1 + frame, IMAGE_START, *[IMAGE] * config.tile_tokens, IMAGE_END, LINE]
        ids += added
        supervised += [False] * len(added)
    v = config.vision
    tiles = sum(len(one.frames) for one in shown)
    rows = rng.standard_normal((tiles, v.rows, v.patch_width), dtype=np.float32)
    rows[:, 0] = 0  # the class token has no pixels
    ids_T = np.array(ids, dtype=np.int64)
    supervised[-1] = True  # at least one, however short the text
    return Document(
        ids_T=ids_T,
        positions_AT=FAMILY.positions(config, ids_T, shown, (seed, 0, 0)),
        weights_T=np.array(supervised, dtype=np.float32) * supervise,
        media=tuple(shown),
        patches=rows.reshape(-1, v.patch_width),
    )


def pixels_of(config: InternVLConfig, document: Document) -> Tensor | None:
    """The pictures `[tiles, 3, height, width]` that a document's patch rows came from, put together patch by patch."""
    if document.patches is None or not len(document.patches):
        return None
    v = config.vision
    tiles = torch.from_numpy(document.patches).reshape(-1, v.rows, v.channels, v.patch, v.patch)
    pixels = torch.empty(len(tiles), v.channels, v.image, v.image)
    blocks = v.side // 2
    for i in range(v.side**2):
        block, place = divmod(i, 4)
        y = (block // blocks * 2 + place // 2) * v.patch
        x = (block % blocks * 2 + place % 2) * v.patch
        pixels[:, :, y : y + v.patch, x : x + v.patch] = tiles[:, 1 + i]
    return pixels


def _scale(model: torch.nn.Module) -> None:
    """Weights on which mistakes show.

    The encoder's blocks must weigh as much as the patches that they are added to, or their norms' gradients are so
    small that three steps move them by a few thousand units of rounding, and one unit looks like an error: hence small
    patches and larger matrices.
    """
    with torch.no_grad():
        for name, param in model.named_parameters():
            if any(part in name for part in ("cls_token", "class_emb", "position_emb")):
                param.normal_(0, 0.3)
            elif any(part in name for part in ("lambda_", ".ls1", ".ls2")):
                param.normal_(1, 0.1)
            elif "patch_embedding" in name:
                param.mul_(0.5) if param.ndim > 1 else param.normal_(0, 0.1)
            elif param.ndim > 1 and "encoder" in name:
                param.mul_(2 * WEIGHT_SCALE)
            elif param.ndim > 1 and "embed_tokens" not in name and "tok_embeddings" not in name:
                param.mul_(WEIGHT_SCALE)
            elif param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)  # biases and norms away from zero and one


def make_case(
    kind: str = "qwen2", positions: PositionRule | None = None, seed: int = 0, tied: bool = False, steps: int = 3
) -> Case:
    """Scaled random weights and two global batches' worth of samples."""
    config = tiny_config(kind, positions, tied)
    torch.manual_seed(seed)
    model = oracle(config) if kind == "qwen2" else Reference(config)
    _scale(model)
    if kind == "qwen2":
        weights = canonical(config, {name_on_disk(n): p.detach() for n, p in model.named_parameters()})
    else:
        weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    documents = tuple(
        make_document(config, content, seed + i, supervise=i % len(CONTENTS) != UNSUPERVISED)
        for i, content in enumerate(CONTENTS * 2)
    )
    return Case("internvl", config, weights, documents, len(CONTENTS), steps, OPTIMIZER)


def variants() -> dict[str, Case]:
    """The cases of the certificate: both decoders, and V2PE with a stride that gives tokens fractions of a position."""
    return {
        "qwen2": make_case("qwen2"),
        "internlm2": make_case("internlm2"),
        "v2pe": make_case("internlm2", PositionRule("v2pe_fix", 96)),
    }


def _stacked(to: WeightMap, of: WeightMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the map `of`, put together as the tensors of the map `to`."""
    shapes = logical_tensors(to)
    found = {}
    for name, pieces in relative(to, of).items():
        if all(piece.tensor.name in tensors for piece in pieces):
            rows = [tensors[p.tensor.name].reshape(p.tensor.matrix)[p.start : p.start + p.rows] for p in pieces]
            found[name] = torch.cat(rows).reshape(shapes[name].shape)
    return found


def canonical(config: InternVLConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors as OpenGVLab's checkpoint has them."""
    return _stacked(FAMILY.weights(config), FAMILY.layouts["hf"].weights(config), tensors)


def as_transformers(config: InternVLConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenGVLab's tensors as transformers' checkpoint has them."""
    return _stacked(FAMILY.layouts["hf"].weights(config), FAMILY.weights(config), tensors)


def forward(model: Any, document: Document) -> Tensor:
    """Logits `[T, V]` of one sample, from transformers' model or the reference."""
    ids = torch.from_numpy(document.ids_T)
    pixels = pixels_of(tiny_config(), document)
    if isinstance(model, Reference):
        return model(ids, pixels)
    shown = {} if pixels is None else {"pixel_values": pixels}
    logits: Tensor = model(input_ids=ids[None], **shown, use_cache=False).logits[0]
    return logits


def reference_model(case: Case) -> Any:
    """The oracle of a case, with its weights."""
    model = oracle(case.config) if case.config.decoder.kind == "qwen2" else Reference(case.config)
    to = as_transformers(case.config, case.weights) if case.config.decoder.kind == "qwen2" else case.weights
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(to[name_on_disk(name)] if case.config.decoder.kind == "qwen2" else to[name])
    return model


def reference(case: Case, batches: Sequence[Sequence[Document]]) -> Numbers:
    """The oracle's losses, gradients and weights, under the names of the canonical layout."""
    model = reference_model(case)
    if case.config.decoder.kind != "qwen2":
        return train_reference(model, forward, batches, case.optimizer, str, tensor_options(case))
    options = tensor_options(case, FAMILY.layouts["hf"].weights(case.config))
    numbers = train_reference(model, forward, batches, case.optimizer, name_on_disk, options)
    return replace(
        numbers,
        gradients=canonical(case.config, numbers.gradients),
        weights=canonical(case.config, numbers.weights),
    )
