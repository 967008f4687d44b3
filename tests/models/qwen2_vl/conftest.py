"""A tokenizer for the tests of Qwen2-VL's chat format: the one that the digits example makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tetrascope.engine.data.tokenizer import load_tokenizer

PREPARE = Path(__file__).resolve().parents[3] / "examples" / "digits_vqa" / "prepare.py"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte-level BPE with Qwen2-VL's special tokens and a ChatML template."""
    spec = importlib.util.spec_from_file_location("digits_vqa_prepare_for_chat", PREPARE)
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = prepare  # dataclasses look their module up there
    spec.loader.exec_module(prepare)
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    prepare.write_tokenizer(folder)
    return load_tokenizer(folder)
