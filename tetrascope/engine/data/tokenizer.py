"""The tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tetrascope.errors import UserError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers loads it. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"data.tokenizer: {folder} is not a folder; give one that holds a Hugging Face tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: {folder} holds no tokenizer that transformers can load: {error}") from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide what text becomes."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
    return [folder / name for name in names if (folder / name).is_file()]
