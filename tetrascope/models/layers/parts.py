"""Parts of a model as checkpoints of their own hold them: a language model, a vision encoder, an adaptor.

The first stages of training start from such checkpoints, since one of the whole model does not exist yet. A family
says under `parts` which it can take: `language` (parameters `embed`, `layers`, `norm`, `head`), `vision`, `adaptor`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.decoder_tables import decoder_weights
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.layers.vit_tables import clip_weights
from tetrascope.models.weights import CheckpointLayout, WeightMap


@dataclass(frozen=True)
class Setting:
    """A fact of which our configuration (`field`) and a part's config.json (`key`) must say the same."""

    field: str
    ours: Any
    key: str
    theirs: Any


@dataclass(frozen=True)
class Part:
    """How checkpoints of a part name its tensors, and what their config.json must say."""

    layouts: Mapping[str, CheckpointLayout]
    """Kinds of checkpoints by name. Their maps have some of the model's parameters, not always the same ones."""
    settings: Callable[[Any, dict[str, Any]], Sequence[Setting]] | None = None
    """Our configuration and the contents of config.json -> what to compare, since shapes do not tell it: heads, rotary
    base, activation. Raises UserError for another kind of model. None: config.json is not needed."""
    vocabulary: frozenset[str] = frozenset()
    """Tensors with a row for each token, of which a checkpoint may have fewer or more than the model."""


def _never_written(config: Any, dtype: str) -> Mapping[str, dict[str, Any]]:
    """`CheckpointLayout.configs` of a part: parts are read only."""
    return {}


def part_layout(
    weights: Callable[[Any], WeightMap],
    ignored: tuple[str, ...] = (),
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {},
) -> CheckpointLayout:
    """A layout that is read and never written."""
    return CheckpointLayout(weights, _never_written, ignored, copies)


def language_part(*kinds: str) -> Part:
    """A plain causal language model: transformers' `llama`, `qwen2` or `qwen3` (`kinds`: model_type in config.json)."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    layout = part_layout(
        weights=lambda config: decoder_weights(config.decoder),
        ignored=(r".*\.rotary_emb\.inv_freq",),
        copies=lambda config: {head: embedding} if config.decoder.tied_embeddings else {},
    )
    return Part(
        {"causal language model": layout},
        lambda config, raw: decoder_settings(config.decoder, transformers_config(raw, kinds)),
        frozenset({head, embedding}),
    )


def decoder_settings(shape: DecoderShape, theirs: Any) -> list[Setting]:
    """What to compare of a decoder with transformers' configuration of a causal language model."""
    rope = theirs.rope_parameters
    heads = theirs.num_attention_heads
    found = [
        ("hidden", "hidden_size", theirs.hidden_size),
        ("intermediate", "intermediate_size", theirs.intermediate_size),
        ("layers", "num_hidden_layers", theirs.num_hidden_layers),
        ("heads", "num_attention_heads", heads),
        ("kv_heads", "num_key_value_heads", theirs.num_key_value_heads),
        ("head_dim", "head_dim", getattr(theirs, "head_dim", None) or theirs.hidden_size // heads),
        ("rms_eps", "rms_norm_eps", theirs.rms_norm_eps),
        ("rope_theta", "rope_theta", rope["rope_theta"]),
        ("tied_embeddings", "tie_word_embeddings", bool(theirs.tie_word_embeddings)),
    ]
    return [
        *(Setting(f"decoder.{field}", getattr(shape, field), key, value) for field, key, value in found),
        Setting("decoder (rotary positions)", "default", "rope_type", rope["rope_type"]),
        Setting("decoder (activation)", "silu", "hidden_act", theirs.hidden_act),
        Setting("decoder (attention)", False, "use_sliding_window", getattr(theirs, "use_sliding_window", False)),
    ]


def _plain(config: Any, prefix: str) -> WeightMap:
    return clip_weights(config.vision, prefix)


def vision_part(*kinds: str, dropped: int = 0, weights: Callable[[Any, str], WeightMap] = _plain) -> Part:
    """transformers' `clip` or `siglip` (`kinds`): the whole model or the encoder alone.

    dropped: blocks at the end of the checkpoint that the family's encoder leaves out, since it takes the features
    before them. weights: configuration and prefix -> map of the encoder. Other tensors, such as those of the text
    encoder and the projections, are no part of ours.
    """

    def layout(prefix: str) -> CheckpointLayout:
        return part_layout(lambda config: weights(config, prefix), ignored=(".*",))

    def settings(config: Any, raw: dict[str, Any]) -> list[Setting]:
        kind = raw.get("model_type")
        alone = raw if kind not in kinds else {"model_type": f"{kind}_vision_model", **raw.get("vision_config", {})}
        theirs = transformers_config(alone, [f"{kind}_vision_model" for kind in kinds])
        return vit_settings(config.vision, theirs, dropped)

    # Published checkpoints have the prefix, as has the whole model; transformers 5 writes the encoder alone without.
    return Part({"with prefix": layout("vision_model."), "without prefix": layout("")}, settings)


def vit_settings(shape: ViTShape, theirs: Any, dropped: int = 0) -> list[Setting]:
    """What to compare of a plain vision transformer with transformers' CLIPVisionConfig or SiglipVisionConfig.

    theirs: such an object; a field that it lacks counts as a difference.
    """
    found = [
        ("width", "hidden_size"),
        ("heads", "num_attention_heads"),
        ("mlp", "intermediate_size"),
        ("image", "image_size"),
        ("patch", "patch_size"),
        ("channels", "num_channels"),
        ("activation", "hidden_act"),
        ("norm_eps", "layer_norm_eps"),
    ]
    layers = "vision.layers" + f" (with the {dropped} left out)" * bool(dropped)
    return [
        *(Setting(f"vision.{field}", getattr(shape, field), key, getattr(theirs, key, None)) for field, key in found),
        Setting(layers, shape.layers + dropped, "num_hidden_layers", getattr(theirs, "num_hidden_layers", None)),
    ]


def transformers_config(raw: dict[str, Any], kinds: Sequence[str]) -> Any:
    """transformers' configuration object, with its defaults. Raises UserError when it is of none of `kinds`."""
    from transformers import CONFIG_MAPPING

    kind = str(raw.get("model_type"))
    if kind not in kinds:
        raise UserError(
            f"config.json: model_type is {kind!r}, the model needs {' or '.join(map(repr, kinds))}; give another folder"
        )
    return CONFIG_MAPPING[kind].from_dict(raw)


def own_part(
    layouts: Mapping[str, CheckpointLayout],
    pattern: str,
    settings: Callable[[Any, dict[str, Any]], Sequence[Setting]] | None = None,
) -> Part:
    """The parameters whose whole names match `pattern`, out of a checkpoint of the family's whole model in any of its
    layouts; its other tensors are no part of ours."""
    return Part({name: own_layout(layout, pattern) for name, layout in layouts.items()}, settings)


def own_layout(layout: CheckpointLayout, pattern: str) -> CheckpointLayout:
    """What `own_part` makes of one layout."""
    return part_layout(lambda config: matching(layout.weights(config), pattern), ignored=(".*",))


def matching(weights: WeightMap, pattern: str) -> WeightMap:
    """The part of a map whose parameters' whole names match."""
    return {name: pieces for name, pieces in weights.items() if re.fullmatch(pattern, name)}


def own_settings(
    from_hf: Callable[[dict[str, Any]], Any], section: str
) -> Callable[[Any, dict[str, Any]], list[Setting]]:
    """`Part.settings` that compares all of one section of the family's configuration."""

    def settings(config: Any, raw: dict[str, Any]) -> list[Setting]:
        ours, theirs = getattr(config, section), getattr(from_hf(raw), section)
        return [
            Setting(f"{section}.{f}", value, f"{section}.{f}", getattr(theirs, f)) for f, value in vars(ours).items()
        ]

    return settings
