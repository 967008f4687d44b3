"""What a model family provides, and the list of families.

A family is a folder: `model.py` (plain PyTorch), `weights.py` (Hugging Face names), `sharding.py` (tensor-parallel
table), `positions.py`, `chat.py` and `preprocess.py` (from samples to tensors). `FAMILY` in its `__init__.py` ties
them together; the rest of the engine uses nothing else of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from tetrascope.errors import UserError
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.sharding import ShardingTable
from tetrascope.models.weights import WeightMap

FAMILIES = {"qwen2_vl": "tetrascope.models.qwen2_vl"}
"""Family name -> module that defines FAMILY."""


@dataclass(frozen=True)
class Stage:
    """Part of a model that one pipeline stage holds: decoder layers, and what comes before and after them.

    `first` adds vision encoder, adaptor and token embedding; `last` the final norm and the output head.
    """

    layers: range
    first: bool
    last: bool


class VisionShape(Protocol):
    """The vision widths that FLOP counting and layout checks need."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp(self) -> int: ...
    @property
    def patch_width(self) -> int: ...
    @property
    def merge(self) -> int: ...


class ModelConfig(Protocol):
    """The part of a family's configuration that the engine reads."""

    @property
    def decoder(self) -> DecoderShape: ...
    @property
    def vision(self) -> VisionShape: ...


class ImageProcessor(Protocol):
    """From a picture to patch rows."""

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Frames, patch rows and patch columns of a picture of that size, from its header alone."""

    def patches(self, image: Image.Image) -> np.ndarray:
        """float32 `[t·h·w, P]`, in the order the model expects."""

    def save(self, folder: str) -> None:
        """Writes the Hugging Face `preprocessor_config.json`."""


class Chat(Protocol):
    """From messages to tokens."""

    def encode(self, messages: Sequence[dict[str, Any]], visual_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and which of them are supervised, bool `[T]`.

        `visual_tokens`: number of visual tokens of each image, in order.
        """


@dataclass(frozen=True)
class Family:
    """Everything the engine knows of a model family."""

    name: str
    config_class: type
    complete: Callable[[dict[str, Any], Any], dict[str, Any]]
    """Fills vocabulary size and special token ids of a configuration from a tokenizer."""
    from_hf: Callable[[dict[str, Any]], Any]
    to_hf: Callable[[Any, str], dict[str, Any]]
    """Configuration and dtype name -> the contents of config.json."""
    build: Callable[[Any, Stage, AttentionFn], nn.Module]
    sharding: Callable[[Any], ShardingTable]
    weights: Callable[[Any], WeightMap]
    initial: Callable[[Any, str, tuple[int, ...]], tuple[str, float]]
    """Hugging Face tensor name and shape -> ("normal", standard deviation) or ("constant", value)."""
    positions: Callable[[Any, np.ndarray, Sequence[tuple[int, int, int]]], np.ndarray]
    """Token ids and media grids of one sample -> position ids int64 `[axes, T]`."""
    patch_positions: Callable[[Any, Sequence[tuple[int, int, int]]], tuple[Tensor, tuple[int, ...]]]
    """Media grids -> patch positions int64 `[2, N]` and frame lengths in patches."""
    visual_ids: Callable[[Any], tuple[int, ...]]
    """The token ids that visual features replace."""
    image_processor: Callable[[Any, int, int], ImageProcessor]
    """Configuration, min and max pixels of a picture."""
    chat: Callable[[Any, Any], Chat]
    """Configuration and tokenizer."""


def get_family(name: str) -> Family:
    """The family called `name`. Raises UserError when there is none."""
    if name not in FAMILIES:
        raise UserError(f"model.family: unknown family {name!r}; known families: {', '.join(sorted(FAMILIES))}")
    family: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return family
