"""A tokenizer for the tests of LongVILA's chat formats: one token a byte, and Qwen2's special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(specials: list[str]) -> Any:
    """256 bytes, then the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": specials})
    return fast


@pytest.fixture
def tokenizer() -> Any:
    """As Qwen2's: no token for images."""
    return make_tokenizer(SPECIALS)


@pytest.fixture
def tokenizer_with_image() -> Any:
    """As VILA's of NVILA and later: `<image>` among the special tokens."""
    return make_tokenizer([*SPECIALS, "<image>"])
