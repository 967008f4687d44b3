"""Batches on which a step of ours and a step of transformers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetrascope.engine.data.document import Document
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, Qwen2VLDecoder, Qwen2VLVision
from tetrascope.tools.verify.families import qwen2_vl as family

SIZES = {
    "0.5M": (Qwen2VLDecoder(64, 192, 4, 4, 2, 2048), Qwen2VLVision(64, 2, 4), (2, 3, 3)),
    "5M": (Qwen2VLDecoder(256, 704, 4, 4, 2, 4096), Qwen2VLVision(128, 4, 4), (8, 12, 12)),
    "20M": (Qwen2VLDecoder(384, 1024, 8, 6, 2, 4096), Qwen2VLVision(192, 6, 6), (8, 12, 12)),
}
"""Decoder, vision encoder and rotary section, by their parameters."""

Content = Sequence[int | tuple[int, int, int]]
CONTENTS: dict[str, list[Content]] = {
    "packed": [(4, (1, 8, 8), 60), (80,), (4, (1, 8, 12), 50), (70,), (2, (1, 8, 8), (1, 8, 8), 40), (78,)],
    "unequal": [(8, (1, 16, 16), 300), (24,), (4, (1, 4, 4), 20), (60,), (12,), (4, (1, 8, 4), 90), (35,), (16,)],
}
"""Samples as text lengths and image grids: of about one length, and from 12 to 374 tokens."""


@dataclass(frozen=True)
class BenchCase:
    """One model on both sides. inputs: of transformers' forward, labels included."""

    config: Qwen2VLConfig
    weights: dict[str, Tensor]
    documents: list[Document]
    model: Any
    inputs: dict[str, Any]


def bench_case(size: str, batch: str) -> BenchCase:
    """Raises UserError for an unknown size."""
    if size not in SIZES:
        raise UserError(f"--sizes: unknown {size!r}; choose from {', '.join(SIZES)}")
    decoder, vision, section = SIZES[size]
    config = replace(family.tiny_config(), decoder=decoder, vision=vision, mrope_section=section)
    torch.manual_seed(0)
    model = family.oracle(config)
    model.set_attn_implementation("sdpa")
    weights = {family.name_on_disk(n): p.detach().clone() for n, p in model.named_parameters()}
    documents = [family.make_document(config, content, i) for i, content in enumerate(CONTENTS[batch])]
    inputs = packed_inputs(documents) if batch == "packed" else padded_inputs(documents)
    return BenchCase(config, weights, documents, model, inputs)


def _labels(document: Document) -> np.ndarray:
    """Token ids where they count, −100 elsewhere; the first token of a document is nobody's target."""
    labels = np.where(document.weights_T > 0, document.ids_T, -100)
    labels[0] = -100
    return labels


def _media(documents: Sequence[Document]) -> dict[str, Tensor]:
    grids = [one.grid for d in documents for one in d.media]
    patches = [d.patches for d in documents if d.patches is not None]
    return {"pixel_values": torch.from_numpy(np.concatenate(patches)), "image_grid_thw": torch.tensor(grids)}


def packed_inputs(documents: Sequence[Document]) -> dict[str, Any]:
    """One row that holds all samples. transformers keeps them apart by the first row of four of the positions."""
    ids = torch.from_numpy(np.concatenate([d.ids_T for d in documents]))[None]
    text = np.concatenate([np.arange(len(d.ids_T)) for d in documents])[None]
    positions = np.concatenate([d.positions_AT for d in documents], axis=1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == family.IMAGE).int(),
        "position_ids": torch.from_numpy(np.concatenate([text, positions]))[:, None],
        "labels": torch.from_numpy(np.concatenate([_labels(d) for d in documents]))[None],
        **_media(documents),
    }


def padded_inputs(documents: Sequence[Document]) -> dict[str, Any]:
    """One row a sample, padded on the right to the longest."""
    longest = max(len(d.ids_T) for d in documents)

    def padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(r, (0, longest - len(r)), constant_values=value) for r in rows]))

    ids = padded([d.ids_T for d in documents], family.PAD)
    positions = [padded([d.positions_AT[axis] for d in documents], 0) for axis in range(3)]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == family.IMAGE).int(),
        "attention_mask": padded([np.ones_like(d.ids_T) for d in documents], 0),
        "position_ids": torch.stack(positions),
        "labels": padded([_labels(d) for d in documents], -100),
        **_media(documents),
    }
