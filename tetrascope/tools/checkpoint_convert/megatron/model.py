"""Which of Megatron-Core's models a model of ours is, and the weight map between the two."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tetrascope.models.family import Family, get_family
from tetrascope.models.layers.parts import matching
from tetrascope.models.weights import WeightMap
from tetrascope.tools.checkpoint_convert.megatron import causal_lm
from tetrascope.tools.checkpoint_convert.megatron.mapping import (
    LANGUAGE,
    UNUSED,
    VISION,
    Naming,
    gpt_weights,
    projection_weights,
    vit_weights,
)

WHOLE_MODELS = ("llava",)
"""Families that Megatron-Core's LLaVAModel computes. Those of the other encoders it does not: its SigLIP always ends
with a LayerNorm that LLaVA-OneVision and LongVILA take their features before, its InternViT has no LayerScale, and of
Qwen's encoders it has none."""

LANGUAGE_PARAMETERS = r"(embed|layers|norm|head)\..*"
"""Our parameters that are a GPTModel."""


@dataclass(frozen=True)
class Names:
    """How a checkpoint spells what it holds."""

    whole: bool
    """A LLaVAModel, of which `language_model.` is a part; else a GPTModel."""
    language: Naming
    vision: Naming


def names_of(tensors: Iterable[str]) -> Names:
    """The spelling of a checkpoint with tensors of these names."""
    names = set(tensors)
    whole = any(name.startswith(LANGUAGE) for name in names)

    def naming(prefix: str) -> Naming:
        own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        stacked = not any(re.match(r"decoder\.layers\.\d", name) for name in own)
        separate = any(re.fullmatch(r"decoder\.layers\.(\d+\.)?input_layernorm\.weight", name) for name in own)
        return Naming(stacked, separate)

    return Names(whole, naming(LANGUAGE if whole else ""), naming(VISION) if whole else Naming())


def find_family(name: str) -> Family:
    """The family called `name`, language models alone included."""
    return causal_lm.FAMILY if name == causal_lm.FAMILY.name else get_family(name)


def megatron_weights(family: Family, config: Any, names: Names) -> WeightMap:
    """The tensors of the GPTModel, or of the whole LLaVAModel, over our parameters, not all of them for a GPTModel."""
    if not names.whole:
        return gpt_weights(config.decoder, naming=names.language)
    found = {
        **vit_weights(config.vision, naming=names.vision),
        **projection_weights(config.decoder.hidden, config.vision.width),
        **gpt_weights(config.decoder, LANGUAGE, names.language),
    }
    canonical = family.weights(config)
    for name in canonical.keys() - found.keys():
        found[name] = tuple(
            replace(piece, tensor=replace(piece.tensor, name=UNUSED + piece.tensor.name)) for piece in canonical[name]
        )
    return {name: found[name] for name in canonical}


def language_map(family: Family, config: Any) -> WeightMap:
    """The canonical map of the language model's parameters."""
    return matching(family.weights(config), LANGUAGE_PARAMETERS)
