"""Tiny models of transformers, as folders that are converted and as the oracle of what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB = 251
"""Not a multiple of anything that Megatron-Core pads to."""

KINDS = ("llama", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied")


def causal_lm(kind: str) -> Any:
    """transformers' model of that kind, fp32, eager: four layers, two query heads for each key/value head.

    Matrices are scaled up and vectors moved away from zero and one, since a default-initialised model is nearly blind
    to positions, to exchanged heads and to left-out biases.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, _, tied = kind.partition("-")
    config = CONFIG_MAPPING[model_type](
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32 if model_type == "qwen3" else 16,
        vocab_size=VOCAB,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        max_position_embeddings=512,
        tie_word_embeddings=bool(tied),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)
            elif "embed_tokens" not in name:
                param.mul_(6)
    return model.eval()


def write_causal_lm(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model of that kind as a Hugging Face folder."""
    causal_lm(kind).to(dtype).save_pretrained(folder)
    return folder


def token_ids() -> Tensor:
    """`[2, 24]`."""
    return torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
