"""A Llama-like tokenizer for the tests of LLaVA's chat formats."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<unk>", "<s>", "</s>")
MERGES = (("▁", "a"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "U"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Letters, byte fallback, a few merges; the order of special tokens, the normalizer that puts ▁ before every piece
    of text, and the added `<image>` and `<pad>` are those of the llava-hf checkpoints."""
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    tokens += [a + b for a, b in MERGES]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocabulary, list(MERGES), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return fast
