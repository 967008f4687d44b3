"""Checkpoints that parts of an InternVL can start from: a language model, an InternViT, another InternVL's adaptor."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.internvl.config import InternVLConfig
from tetrascope.models.internvl.hf_config import from_hf
from tetrascope.models.internvl.weights import LAYOUTS
from tetrascope.models.layers.parts import (
    Part,
    Setting,
    decoder_settings,
    matching,
    own_part,
    own_settings,
    part_layout,
    transformers_config,
    vit_settings,
)
from tetrascope.models.weights import WeightMap, rename, renamed

_OPENGVLAB = LAYOUTS["opengvlab"]
_ALONE = [(r"(language|vision)_model\.", "")]
"""In a folder of its own, a part has the same names without the first one."""


def _language(config: InternVLConfig) -> WeightMap:
    return renamed(matching(_OPENGVLAB.weights(config), r"(embed|layers|norm|head)\..*"), _ALONE)


def _tied_head(config: InternVLConfig) -> Mapping[str, str]:
    return {rename(copy, _ALONE): rename(name, _ALONE) for copy, name in _OPENGVLAB.copies(config).items()}


def _language_settings(config: InternVLConfig, raw: dict[str, Any]) -> list[Setting]:
    """InternLM2's config.json has Llama's fields. Dynamic NTK changes nothing before the longest sample allowed."""
    kind = config.decoder.kind
    if raw.get("model_type") != kind:
        raise UserError(
            f"config.json: model_type is {raw.get('model_type')!r}, model.config.decoder.kind {kind!r}; set the latter "
            "or give another folder"
        )
    fields = "llama" if kind == "internlm2" else kind
    theirs = transformers_config({**raw, "model_type": fields}, [fields])
    if theirs.rope_parameters["rope_type"] == "dynamic":
        theirs.rope_parameters = {**theirs.rope_parameters, "rope_type": "default"}
    return decoder_settings(config.decoder, theirs)


def _encoder(config: InternVLConfig) -> WeightMap:
    return renamed(matching(_OPENGVLAB.weights(config), r"vision\..*"), _ALONE)


_whole_model_settings = own_settings(from_hf, "vision")


def _encoder_settings(config: InternVLConfig, raw: dict[str, Any]) -> list[Setting]:
    if raw.get("model_type") != "intern_vit_6b":  # which the smaller ones are called too
        return _whole_model_settings(config, raw)
    fixed = {"qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm"}
    return [
        *vit_settings(config.vision, SimpleNamespace(**raw)),
        *(Setting(f"vision ({key})", value, key, raw.get(key)) for key, value in fixed.items()),
    ]


PARTS = {
    "language": Part(
        {"alone": part_layout(_language, _OPENGVLAB.ignored, _tied_head)},
        _language_settings,
        frozenset({"model.tok_embeddings.weight", "output.weight", "model.embed_tokens.weight", "lm_head.weight"}),
    ),
    "vision": Part(
        {"alone": part_layout(_encoder, ignored=(".*",)), **own_part(LAYOUTS, r"vision\..*").layouts},
        _encoder_settings,
    ),
    "adaptor": own_part(LAYOUTS, r"adaptor\..*"),
}
