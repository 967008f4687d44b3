"""Language models alone, as Megatron-Core's GPTModel holds them: transformers' Llama, Qwen2 and Qwen3.

They are what a GPTModel checkpoint becomes outside Megatron, and what the vision-language families start their language
part from. `FAMILY` says of them what converting needs; they cannot be trained by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tetrascope.errors import UserError
from tetrascope.models.family import Family, family_of, get_family
from tetrascope.models.hf_fields import first_token, need, reads_config_json
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.decoder_tables import decoder_sharding, decoder_weights
from tetrascope.models.layers.parts import transformers_config
from tetrascope.models.weights import CheckpointLayout, WeightMap, single_config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""model_type -> architecture in config.json."""


@dataclass(frozen=True)
class CausalLMConfig:
    """A language model.

    positions: the most that it takes. raw: the config.json that it came from, whose other fields are kept.
    """

    decoder: DecoderShape
    positions: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int = 0
    pad_token_id: int = 0
    raw: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def model_type(self) -> str:
        """Which of transformers' models computes this decoder."""
        if self.decoder.qk_norm:
            return "qwen3"
        return "qwen2" if self.decoder.qkv_bias else "llama"


def weights(config: CausalLMConfig) -> WeightMap:
    """Names on disk. Tied embeddings: the head is the embedding."""
    return decoder_weights(config.decoder)


@reads_config_json
def from_hf(raw: dict[str, Any]) -> CausalLMConfig:
    """The contents of config.json. Raises UserError for another model, and for options that are not available."""
    theirs = transformers_config(raw, list(ARCHITECTURES))
    qwen2 = theirs.model_type == "qwen2"
    need("hidden_act", theirs.hidden_act, "silu")
    need("mlp_bias", getattr(theirs, "mlp_bias", False), False)
    if not qwen2:
        need("attention_bias", theirs.attention_bias, False)
    need("use_sliding_window", getattr(theirs, "use_sliding_window", False), False)
    rope = theirs.rope_parameters
    need("rope_parameters.rope_type", rope["rope_type"], "default")
    decoder = DecoderShape(
        hidden=theirs.hidden_size,
        intermediate=theirs.intermediate_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        vocab=theirs.vocab_size,
        rms_eps=theirs.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        qkv_bias=qwen2,
        tied_embeddings=bool(theirs.tie_word_embeddings),
        qk_norm=theirs.model_type == "qwen3",
        head_dim=getattr(theirs, "head_dim", None) or 0,
    )
    eos = first_token(theirs.eos_token_id, 0)
    pad = first_token(theirs.pad_token_id, eos)
    return CausalLMConfig(decoder, theirs.max_position_embeddings, theirs.bos_token_id, eos, pad, dict(raw))


def to_hf(config: CausalLMConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json, which transformers 4 and 5 both read."""
    d = config.decoder
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "vocab_size": d.vocab,
        "rms_norm_eps": d.rms_eps,
        "tie_word_embeddings": d.tied_embeddings,
        "hidden_act": "silu",
        "max_position_embeddings": config.positions,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if "rope_parameters" not in config.raw:
        fields["rope_theta"] = d.rope_theta
    if config.model_type != "qwen2":
        fields["attention_bias"] = False
    kept = {key: value for key, value in config.raw.items() if key not in ("torch_dtype", "dtype")}
    precision = "torch_dtype" if "torch_dtype" in config.raw else "dtype"
    return {**fields, **kept, precision: dtype}


def _tied_head(config: CausalLMConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.decoder.tied_embeddings else {}


def _not_trained(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "a language model alone can be converted, not trained; start a vision-language family from it with "
        "model.init_from.language"
    )


class _NoMedia:
    """`MediaProcessor` of a model that sees nothing."""

    def __init__(self, config: CausalLMConfig, options: object) -> None:
        """Nothing to remember."""

    def save(self, folder: str) -> None:
        """There is no preprocessor_config.json."""

    image = video = rows = staticmethod(_not_trained)


def initial(config: CausalLMConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """Matrices normal, norm weights one, biases zero."""
    return ("normal", 0.02) if len(shape) > 1 else ("constant", 0.0 if name.endswith(".bias") else 1.0)


FAMILY = Family(
    name="causal_lm",
    architectures=tuple(ARCHITECTURES.values()),
    config_class=CausalLMConfig,
    complete=_not_trained,
    from_hf=from_hf,
    to_hf=to_hf,
    build=_not_trained,
    sharding=lambda config: decoder_sharding(config.decoder),
    weights=weights,
    layouts={
        "causal-lm": CheckpointLayout(
            weights=weights,
            configs=single_config(to_hf),
            ignored=(r".*\.rotary_emb\.inv_freq",),
            copies=_tied_head,
        )
    },
    initial=initial,
    positions=_not_trained,
    vision_layout=_not_trained,
    row_block=lambda config: 1,
    visual_ids=lambda config: (),
    media=_NoMedia,
    media_options=frozenset(),
    chats={},
    presets={},
)


def any_family_of(raw: Mapping[str, Any]) -> Family:
    """The family that the contents of a config.json belong to, language models alone included.

    Raises UserError when there is none.
    """
    named = raw.get("architectures") or []
    alone = set(named) & set(FAMILY.architectures) or (not named and raw.get("model_type") in ARCHITECTURES)
    return FAMILY if alone else get_family(family_of(raw))
