"""Megatron-LM's training arguments, which its checkpoints carry along: the shape of a GPTModel, both ways."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from tetrascope.errors import UserError
from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.tools.checkpoint_convert.megatron.causal_lm import CausalLMConfig

VOCABULARY_DIVISOR = 128
"""Megatron-LM's default of make-vocab-size-divisible-by."""


def padded(vocab: int, tp: int) -> int:
    """Rows of Megatron's tables for a vocabulary under that much tensor parallelism (megatron/training/tokenizer)."""
    return -(-vocab // (VOCABULARY_DIVISOR * tp)) * VOCABULARY_DIVISOR * tp


def to_arguments(
    shape: DecoderShape, padded_vocab: int, dtype: torch.dtype, positions: int | None = None
) -> argparse.Namespace:
    """The arguments that Megatron-LM takes from a checkpoint under --use-checkpoint-args, and those read below.

    positions: the most that the model takes, where that is known. Rotary positions are the plain ones: what a family
    does besides (M-RoPE, V2PE) is no argument of a GPTModel's weights.
    """
    return argparse.Namespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.intermediate,
        num_attention_heads=shape.heads,
        group_query_attention=shape.kv_heads != shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        seq_length=positions,
        max_position_embeddings=positions,
        vocab_size=shape.vocab,
        padded_vocab_size=padded_vocab,
        make_vocab_size_divisible_by=VOCABULARY_DIVISOR,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        normalization="RMSNorm",
        norm_epsilon=shape.rms_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=False,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tokenizer_type="HuggingFaceTokenizer",
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


_NEEDED: dict[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope", "mrope"),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None),
    "use_rope_scaling": (False, None),
    "multi_latent_attention": (False, None),
    "num_experts": (None, 0),
    "apply_layernorm_1p": (False, None),
    "apply_query_key_layer_scaling": (False, None),
}
"""Argument -> the values with which a GPTModel computes what Llama, Qwen2 and Qwen3 do. One that is not there counts as
the first."""


def from_arguments(arguments: Mapping[str, Any], where: str) -> CausalLMConfig:
    """The language model that arguments describe. `where`: the file, for messages.

    Raises UserError when one is missing, or says something else than Llama, Qwen2 and Qwen3 have.
    """
    for name, values in _NEEDED.items():
        value = arguments.get(name, values[0])
        if value not in values:
            raise UserError(
                f"{where}: args.{name} is {value!r}; a language model like Llama, Qwen2 or Qwen3 has {values[0]!r}"
            )
    heads = _integer(arguments, "num_attention_heads", where)
    hidden = _integer(arguments, "hidden_size", where)
    grouped = arguments.get("group_query_attention", arguments.get("num_query_groups") is not None)
    qkv_bias, qk_norm = (bool(arguments.get(name, False)) for name in ("add_qkv_bias", "qk_layernorm"))
    if qkv_bias and qk_norm:
        raise UserError(
            f"{where}: args has both add_qkv_bias and qk_layernorm; Llama, Qwen2 and Qwen3 have at most one"
        )
    vocab = arguments.get("vocab_size") or _integer(arguments, "padded_vocab_size", where)
    shape = DecoderShape(
        hidden=hidden,
        intermediate=_integer(arguments, "ffn_hidden_size", where),
        layers=_integer(arguments, "num_layers", where),
        heads=heads,
        kv_heads=_integer(arguments, "num_query_groups", where) if grouped else heads,
        vocab=int(vocab),
        rms_eps=float(arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5))),
        rope_theta=float(arguments.get("rotary_base", 10000)),
        qkv_bias=qkv_bias,
        tied_embeddings=not arguments.get("untie_embeddings_and_output_weights", False),
        qk_norm=qk_norm,
        head_dim=int(arguments.get("kv_channels") or hidden // heads),
    )
    return CausalLMConfig(shape, int(arguments.get("max_position_embeddings") or 32768))


def _integer(arguments: Mapping[str, Any], name: str, where: str) -> int:
    value = arguments.get(name)
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"{where}: args.{name} is {value!r}; give --config with a Hugging Face folder that describes the model"
        )
    return value
