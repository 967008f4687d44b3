"""What a model family provides, and the list of families.

A family is a folder: `model.py` (plain PyTorch), `weights.py` (Hugging Face names), `sharding.py` (tensor-parallel
table), `positions.py`, `chat.py` and `preprocess.py` (from samples to tensors). `FAMILY` in its `__init__.py` ties
them together; the rest of the engine uses nothing else of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import nn

from tetrascope.errors import UserError
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.parts import Part
from tetrascope.models.layers.positions import Draw
from tetrascope.models.media import Media, MediaOptions, VisionCost, VisionLayout
from tetrascope.models.sharding import ShardingTable
from tetrascope.models.weights import CheckpointLayout, WeightMap

FAMILIES = {
    "qwen2_vl": "tetrascope.models.qwen2_vl",
    "qwen2_5_vl": "tetrascope.models.qwen2_5_vl",
    "qwen3_vl": "tetrascope.models.qwen3_vl",
    "llava": "tetrascope.models.llava",
    "llava_onevision": "tetrascope.models.llava_onevision",
    "internvl": "tetrascope.models.internvl",
    "longvila": "tetrascope.models.longvila",
}
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
    """What layout checks and blank pictures need of the vision encoder."""

    @property
    def heads(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def patch_width(self) -> int: ...


class ModelConfig(Protocol):
    """The part of a family's configuration that the engine reads."""

    @property
    def decoder(self) -> DecoderShape: ...
    @property
    def vision(self) -> VisionShape: ...
    @property
    def vision_cost(self) -> VisionCost: ...
    @property
    def typical(self) -> Media:
        """A picture of usual size, by which costs are weighed when none is known."""

    @property
    def pad_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...


class MediaProcessor(Protocol):
    """From pictures and videos to patch rows. Sizes are known from file headers before any pixel is."""

    def image(self, width: int, height: int, images: int) -> Media:
        """A picture of that size in a sample of that many images and videos.

        Raises UserError for a size that the family cannot take.
        """

    def video(self, frames: int, fps: float, width: int, height: int) -> Media:
        """A video of that many frames, of which `numbers` will be decoded. Raises UserError when it has too few."""

    def rows(self, pictures: Sequence[Image.Image], of: Media) -> np.ndarray:
        """float32 `[of.patches, P]` in the order the model expects.

        pictures: RGB; the one picture of an image, or the frames `of.numbers` of a video.
        """

    def save(self, folder: str) -> None:
        """Writes the Hugging Face `preprocessor_config.json`."""


class Chat(Protocol):
    """From messages to tokens."""

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and which of them are supervised, bool `[T]`.

        media: the images and videos of the messages, in order.
        """


@dataclass(frozen=True)
class Family:
    """Everything the engine knows of a model family."""

    name: str
    architectures: tuple[str, ...]
    """What `architectures` in config.json says of its checkpoints, in any layout."""
    config_class: type
    complete: Callable[[dict[str, Any], Any], dict[str, Any]]
    """Fills vocabulary size and special token ids of a configuration from a tokenizer."""
    from_hf: Callable[[dict[str, Any]], Any]
    to_hf: Callable[[Any, str], dict[str, Any]]
    """Configuration and dtype name -> the contents of config.json."""
    build: Callable[[Any, Stage, AttentionFn], nn.Module]
    sharding: Callable[[Any], ShardingTable]
    weights: Callable[[Any], WeightMap]
    """The canonical weight map, whose tensors are the logical ones."""
    layouts: Mapping[str, CheckpointLayout]
    """Kinds of checkpoints, by name; the canonical one, that of `weights`, first."""
    initial: Callable[[Any, str, tuple[int, ...]], tuple[str, float]]
    """Hugging Face tensor name and shape -> ("normal", standard deviation) or ("constant", value)."""
    positions: Callable[[Any, np.ndarray, Sequence[Media], Draw], np.ndarray]
    """Token ids and media of one sample -> position ids int64 `[axes, T]`; Draw: see layers/positions.py."""
    vision_layout: Callable[[Any, Sequence[Media]], VisionLayout]
    """The media of a micro-batch -> positions of their rows, and which features become which tokens."""
    row_block: Callable[[Any], int]
    """Encoder rows that must stay together when the rows are divided."""
    visual_ids: Callable[[Any], tuple[int, ...]]
    """The token ids that visual features replace."""
    media: Callable[[Any, MediaOptions], MediaProcessor]
    media_options: frozenset[str]
    """Which of MediaOptions' fields mean something to the family."""
    chats: Mapping[str, Callable[[Any, Any], Chat]]
    """Chat formats by name, the default one first: configuration and tokenizer -> Chat."""
    presets: Mapping[str, Callable[[], Any]]
    """Published sizes by name -> configuration."""
    unused: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Patterns of parameters that take no part in computing: kept for export, never trained."""
    first_layers: Callable[[Any], int] = lambda config: 1
    """Decoder layers that the first pipeline stage must hold at least."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Checkpoints of their own that parts of a model can start from: `language`, `vision`, `adaptor`."""


def get_family(name: str) -> Family:
    """The family called `name`. Raises UserError when there is none."""
    if name not in FAMILIES:
        raise UserError(f"model.family: unknown family {name!r}; known families: {', '.join(sorted(FAMILIES))}")
    family: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return family


def family_of(raw: Mapping[str, Any]) -> str:
    """The name of the family that the contents of a config.json belong to.

    `architectures` decides, or where it is empty `model_type`. Raises UserError when no family knows the model.
    """
    named = raw.get("architectures") or []
    for name in FAMILIES:
        if set(named) & set(get_family(name).architectures) or (not named and raw.get("model_type") == name):
            return name
    raise UserError(
        f"config.json: no family knows a model with architectures {named} and model_type {raw.get('model_type')!r}; "
        f"known families: {', '.join(sorted(FAMILIES))}"
    )
