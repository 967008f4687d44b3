"""Every family trains from a file of conversations, in several layouts alike, and is read back from its export.

The parity tests feed finished tensors; here tokenizer, chat format, pictures, videos, planning and export of each
family are in the way too. The oracle is the same run on one rank.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine.test_training import CONTEXT, RELATIVE, run_in
from tests.tiny import write_config, write_tokenizer
from tetrascope.engine.config_file import validated
from tetrascope.engine.source import HuggingFaceFolder, read_hf_config
from tetrascope.models.family import FAMILIES, family_of, get_family
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf
from tetrascope.tools.verify.families import get_oracle
from tetrascope.tools.verify.pool import WorkerPool

WITHOUT_VIDEO = {"llava"}
"""Families that take pictures only."""

SPECIALS = ("<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>", "<s>", "</s>", "<unk>", "<pad>")


def write_data(folder: Path, video: bool) -> Path:
    """Pictures of several sizes, one, two or none to a sample, and a video."""
    rng = np.random.default_rng(0)
    for i in range(8):
        size = (60 + 20 * (i % 3), 70 + 30 * (i % 2), 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
    lines = []
    for i in range(8):
        content: list[dict[str, Any]] = [{"type": "image", "image": f"{(i + n) % 8}.png"} for n in range(i % 3)]
        if video and i == 3:
            content = [{"type": "video", "video": ["0.png", "6.png", "0.png", "6.png"], "fps": 2}]
        content.append({"type": "text", "text": f"what is {i}?"})
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"it is {i}"}]
        lines.append(json.dumps({"id": f"s{i}", "messages": messages}))
    path = folder / "family.jsonl"
    path.write_text("\n".join(lines))
    return path


def model_of(name: str) -> dict[str, Any]:
    """The family's tiny shapes; vocabulary and token ids are left to the tokenizer."""
    config = dataclasses.asdict(next(iter(get_oracle(name).variants().values())).config)
    config["decoder"].pop("vocab")
    return {key: value for key, value in config.items() if not key.endswith(("token_id", "token_index"))}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_trains_alike_in_every_layout_and_comes_back(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    data = write_data(tmp_path, name not in WITHOUT_VIDEO)
    config = write_config(
        tmp_path,
        model={"family": name, "config": model_of(name)},
        data={"train": str(data), "max_pixels": None},
        batch={"samples": 4},
        train={"steps": 2},
        optimizer={"lr": 1e-3},
    )
    write_tokenizer(tmp_path / "tokenizer", SPECIALS)
    one = run_in(pool, config, tmp_path / "one", [], 1, stop=2)
    four = run_in(pool, config, tmp_path / "four", ["parallel.tp=2", "parallel.pp=2"], 4, stop=2)
    assert [s["loss"] for s in four] == pytest.approx([s["loss"] for s in one], rel=RELATIVE), CONTEXT
    assert sum(s["images"] for s in one) > 4
    family = get_family(name)
    for layout in family.layouts:
        native_to_hf(Path(four[-1]["checkpoint"]), tmp_path / layout, "float32", layout=layout)
        raw = read_hf_config(tmp_path / layout)
        assert family_of(raw) == name
        read = validated(family.config_class, dataclasses.asdict(family.from_hf(raw)), "config.json")
        HuggingFaceFolder(tmp_path / layout, family.layouts, read).check()
        assert {t.shape for t in logical_tensors(family.weights(read)).values()}
