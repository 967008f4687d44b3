"""Qwen2.5-VL's chat format is Qwen2-VL's; from a data file to tokens, positions and patch rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import write_tokenizer
from tetrascope.engine.config import DataSection
from tetrascope.engine.config_file import validated
from tetrascope.engine.data.mixture import Mixture
from tetrascope.engine.data.samples import Loaded, Task, load_sample
from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.models.media import Media
from tetrascope.models.qwen2_5_vl import FAMILY

SHAPES = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 2, "heads": 2, "intermediate": 44, "full_attention": [1]},
    "mrope_section": [2, 3, 3],
}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def picture(path: Path, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (112, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def opened(folder: Path, messages: list[dict[str, Any]]) -> tuple[Loaded, tuple[Media, ...], Any]:
    """A sample of these messages, its images and videos, and the model's configuration."""
    write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    config = validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config")
    (folder / "train.jsonl").write_text(json.dumps({"messages": messages}))
    section = DataSection(
        train=folder / "train.jsonl", tokenizer=folder / "tokenizer", max_pixels=140 * 112, video_max_pixels=140 * 112
    )
    mixture = Mixture(section, FAMILY, config, tokenizer, folder / "index")
    return load_sample(mixture, FAMILY, config, Task(0, 0, True)), mixture.indexes[0][0].media, config


def test_a_sample_from_its_file_to_tensors(tmp_path: Path) -> None:
    clip = [picture(tmp_path / f"{i}.png", i) for i in range(8)]
    user = [
        {"type": "image", "image": picture(tmp_path / "a.png", 8)},
        {"type": "video", "video": clip, "fps": 2.0},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "yes"}]
    sample, (image, video), config = opened(tmp_path, messages)

    # Pictures of 140 x 112 pixels are 4 x 5 merged patches: a window of 16 and one of 4. Eight frames make four steps,
    # a second apart, that is two temporal positions.
    assert (image.grid, image.tokens, image.windows) == ((1, 8, 10, 0, 1), 20, (64, 16))
    assert (video.grid, video.tokens, video.windows) == ((4, 8, 10, 1, 1), 80, (64, 16) * 4)
    visual = [
        "<|vision_start|>" + pad * n + "<|vision_end|>" for pad, n in (("<|image_pad|>", 20), ("<|video_pad|>", 80))
    ]
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.decode(sample.ids_T.tolist(), skip_special_tokens=False) == (
        f"{SYSTEM}<|im_start|>user\n{visual[0]}{visual[1]}?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    learned = sample.ids_T[sample.supervised_T].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False) == "yes<|im_end|>"

    positions = FAMILY.positions(config, sample.ids_T, (image, video), (0, 0, 0))
    clip_T = sample.ids_T == config.video_token_id
    start = positions[0, np.flatnonzero(clip_T)[0]]
    assert positions[0, clip_T].tolist() == [int(start) + 2 * i for i in range(4) for _ in range(20)]
    after = np.flatnonzero(clip_T)[-1] + 1
    assert positions[:, after].tolist() == [start + 7] * 3  # past the last frame, by the paper's rule

    assert sample.rows is not None and sample.rows.shape == (80 + 320, 1176) and sample.rows.dtype == np.float32


def test_agents_and_boxes_are_there_too(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.png", 0), picture(tmp_path / "b.png", 1)
    steps = [
        {"type": "function", "name": "tap", "arguments": {"point": {"type": "point", "point": [70, 56]}}},
        {"type": "result", "image": second},
        {"type": "return", "text": "done"},
    ]
    user = {"role": "user", "content": [{"type": "image", "image": first}]}
    sample, shown, _ = opened(tmp_path, [user, {"role": "assistant", "content": steps}])
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    learned = tokenizer.decode(sample.ids_T[sample.supervised_T].tolist(), skip_special_tokens=False)
    assert learned == '*FUNCTION*: tap\n*ARGS*: {"point": [500, 500]}\n*RESULT*:*RETURN*: done<|im_end|>'
    assert [one.tokens for one in shown] == [20, 20]
