"""A data set, a tokenizer and a configuration small enough to train in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def write_tokenizer(folder: Path, more: Sequence[str] = ()) -> None:
    """One token a byte, and Qwen2-VL's special tokens; `more` special tokens after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    usual = {"bos_token": "<s>", "unk_token": "<unk>"} if "<s>" in more else {}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, **usual)
    fast.add_special_tokens({"additional_special_tokens": [*SPECIALS, *more]})
    fast.save_pretrained(str(folder))


def write_data(folder: Path, samples: int = 24) -> Path:
    """Pictures of several sizes with a question each; every sixth sample is text only. Returns the JSONL file."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(samples):
        question: list[dict[str, str]] = [{"type": "text", "text": f"what is {i % 5}?"}]
        if i % 6:
            name = f"{i}.png"
            size = (56 + 28 * (i % 3), 56 + 28 * (i % 2), 3)
            Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
            question.insert(0, {"type": "image", "image": name})
        answer = [{"type": "text", "text": f"it is {i % 5}"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"s{i}", "messages": messages}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Data, tokenizer and a run configuration in `folder`; `sections` change single keys. Returns the YAML file."""
    write_tokenizer(folder / "tokenizer")
    config: dict[str, dict[str, Any]] = {
        "model": {
            "family": "qwen2_vl",
            "config": {
                "vision": {"width": 32, "layers": 1, "heads": 2},
                "decoder": {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv_heads": 2},
                "mrope_section": [1, 1, 2],
            },
        },
        "data": {"train": str(write_data(folder)), "tokenizer": str(folder / "tokenizer"), "max_pixels": 50176},
        "batch": {"samples": 8, "micro_batches": 2},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 6, "device": "cpu", "save_every": 100},
        "output": {"dir": str(folder / "run")},
    }
    for name, changes in sections.items():
        config.setdefault(name, {}).update(changes)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
