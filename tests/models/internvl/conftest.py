"""Tokenizers for the tests of InternVL's chat formats: one token a byte, and the published special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def make_tokenizer(specials: list[str]) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": specials})
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """As Qwen2's: nothing before a text."""
    return make_tokenizer(SPECIALS)


@pytest.fixture(scope="session")
def tokenizer_with_bos() -> Any:
    """As InternLM2's: `<s>` before every text."""
    fast = make_tokenizer(SPECIALS)
    fast.bos_token = "<s>"
    fast.add_bos_token = True
    return fast
