"""Conversations from a JSONL file: what is wrong with them is found when the file is opened, and named by line.

Pixels are the exception: only headers are read on opening, and a picture that turns out to be damaged when a step
needs it is reported as BadMedia, which a run counts and survives.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny import write_tokenizer
from tetrascope.engine.config import DataSection, validated
from tetrascope.engine.data.dataset import Dataset, load_tokenizer
from tetrascope.engine.data.files import BadMedia
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import media

SHAPES = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 1, "heads": 2},
    "mrope_section": [2, 3, 3],
}
GRID_4_6 = media("image", (1, 4, 6), 2, size=(90, 60))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset") / "tokenizer"
    write_tokenizer(folder)
    return folder


class Folder:
    """A folder with a data file and pictures a.png (90x60 pixels) and b.png (56x56)."""

    def __init__(self, root: Path, tokenizer_folder: Path) -> None:
        self.root, self.file = root, root / "train.jsonl"
        self._tokenizer_folder, self._tokenizer = tokenizer_folder, load_tokenizer(tokenizer_folder)
        self.config = validated(FAMILY.config_class, FAMILY.complete(SHAPES, self._tokenizer), "model.config")
        for name, size in (("a.png", (90, 60)), ("b.png", (56, 56))):
            picture(*size).save(root / name)

    def write(self, *lines: Any) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.file.write_text("\n".join(texts), encoding="utf-8")

    def open(self, **options: int) -> Dataset:
        section = DataSection(train=self.file, tokenizer=self._tokenizer_folder, **options)  # type: ignore[arg-type]
        return Dataset(section, FAMILY, self.config, self._tokenizer)

    def error(self, *lines: Any, **options: int) -> str:
        self.write(*lines)
        with pytest.raises(UserError) as error:
            self.open(**options)
        return str(error.value)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Folder:
    return Folder(tmp_path, tokenizer_folder)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(name: str, *images: Any, answer: str = "yes") -> dict[str, Any]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "q"}]
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def test_samples_with_their_images(folder: Folder) -> None:
    folder.write(sample("two", "a.png", "b.png"), "", sample("text"))
    dataset = folder.open()
    assert len(dataset) == 2
    two, text = dataset.samples
    # 60x90 pixels round to 56x84: 4x6 patches, 2x3 visual tokens; 56x56 gives 4x4 patches, 2x2.
    assert [one.grid for one in two.info.media] == [(1, 4, 6), (1, 4, 4)] and two.info.patches == 40
    assert [file.source for file in two.files] == [folder.root / "a.png", folder.root / "b.png"]
    assert (two.ids_T == folder.config.image_token_id).sum() == 10
    assert two.info.tokens == len(two.ids_T) == len(two.supervised_T)
    assert two.info.supervised == two.supervised_T.sum() >= 2  # the answer and the end of its turn
    assert text.info.media == text.files == () and text.name == "text"


def test_patches_are_the_processors_of_the_rgb_picture(folder: Folder) -> None:
    picture(90, 60).convert("RGBA").save(folder.root / "alpha.png")
    picture(90, 60).convert("P").save(folder.root / "palette.png")
    picture(90, 60).convert("L").save(folder.root / "grey.png")
    names = ("b.png", "alpha.png", "palette.png", "grey.png")
    folder.write(sample("s", *names))
    dataset = folder.open()
    processor = dataset._reader._processor
    for rows, name in zip(dataset.patches(0), names, strict=True):
        with Image.open(folder.root / name) as image:
            expected = processor.rows([image.convert("RGB")], processor.image(90, 60, 1))
        assert np.array_equal(rows, expected) and rows.std() > 0.5


def test_pixel_bounds_reach_the_processor(folder: Folder) -> None:
    folder.write(sample("s", "a.png"))
    assert folder.open(min_pixels=50176, max_pixels=100352).samples[0].info.patches >= 256
    assert folder.open(min_pixels=784, max_pixels=1568).samples[0].info.patches <= 8


def test_absolute_paths_and_repeated_pictures(folder: Folder) -> None:
    folder.write(sample("s", str(folder.root / "a.png"), "a.png"))
    assert folder.open().samples[0].info.media == (GRID_4_6,) * 2


def test_line_separators_inside_strings_do_not_end_a_line(folder: Folder) -> None:
    # JSON allows U+2028 and U+0085 in strings; str.splitlines would cut there.
    folder.write(json.dumps(sample("s", answer="a\u2028b\x85c"), ensure_ascii=False) + "\r", sample("t"))
    assert [s.name for s in folder.open().samples] == ["s", "t"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("[]", 'expected an object with a list "messages"'),
        ('{"id": "x"}', 'expected an object with a list "messages"'),
        ('{"id": "x", "messages": {}}', 'expected an object with a list "messages"'),
        (sample("x", "none.png"), "sample x: image .*none.png does not exist; fix the path or remove"),
        (sample("x", "text.png"), "sample x: image .*text.png is not readable"),
        (sample("x", "sub"), "sample x: image .*sub is not readable"),
        (sample("x", None), 'sample x: "image" is None; expected the path of a file'),
        (sample("x", ""), "sample x: \"image\" is ''; expected the path of a file"),
        (sample("x", "thin.png"), "sample x: image .*thin.png: image of 5000x20 pixels: .*aspect ratio"),
        ({"id": "x", "messages": [{"role": "user", "content": "q"}]}, "sample x: .*no assistant text"),
        ({"id": "x", "messages": ["q"]}, "sample x: message 'q' must be an object"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "sample line 3: message role 'boss'"),
        (sample("x", "a.png", answer="<|image_pad|>"), "sample x: conversation has 2 image places but 1 images"),
        (sample("x", answer="<|video_pad|>"), "sample x: conversation has 1 image places but 0 images"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(folder: Folder, line: Any, message: str) -> None:
    (folder.root / "text.png").write_text("no picture")
    (folder.root / "sub").mkdir()
    picture(5000, 20).save(folder.root / "thin.png")
    error = folder.error(sample("good", "a.png"), "", line)
    assert error.startswith(f"{folder.file}:3: ") and re.search(message, error)


def test_a_sample_that_is_too_long_is_never_cut(folder: Folder) -> None:
    folder.write(sample("x", "a.png"))
    tokens = folder.open().samples[0].info.tokens
    assert folder.open(max_tokens=tokens).samples[0].info.tokens == tokens
    error = folder.error(sample("x", "a.png"), max_tokens=tokens - 1)
    assert error.startswith(f"{folder.file}:1: sample x: {tokens} tokens, more than data.max_tokens={tokens - 1}; ")
    assert "data.max_pixels" in error


def test_a_picture_too_large_to_open_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # a.png has 5,400; Pillow refuses from twice its limit
    assert "sample x: image" in folder.error(sample("x", "a.png"))


def test_files_that_are_no_data(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"data\.train: .*train\.jsonl cannot be read \(No such file"):
        folder.open()
    assert "holds no samples" in folder.error("", "  ")
    folder.file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"data\.train: .*train\.jsonl is not UTF-8"):
        folder.open()


def test_a_truncated_picture_is_bad_only_when_it_is_decoded(folder: Folder) -> None:
    whole = (folder.root / "a.png").read_bytes()
    (folder.root / "cut.png").write_bytes(whole[: len(whole) // 2])
    folder.write(sample("first", "b.png"), sample("broken", "a.png", "cut.png"))
    dataset = folder.open()
    assert dataset.samples[1].info.media == (GRID_4_6,) * 2  # the header is whole
    assert len(dataset.patches(0)[0]) == 16
    with pytest.raises(BadMedia, match=r"sample broken: image .*cut\.png: "):
        dataset.patches(1)


@pytest.mark.parametrize("change", ["gone", "other size", "text"])
def test_a_picture_that_changes_under_the_run_is_bad(folder: Folder, change: str) -> None:
    folder.write(sample("x", "a.png"))
    dataset = folder.open()
    if change == "gone":
        (folder.root / "a.png").unlink()
    elif change == "other size":
        picture(200, 200).save(folder.root / "a.png")
    else:
        (folder.root / "a.png").write_text("no picture")
    with pytest.raises(BadMedia, match=r"sample x: image .*a\.png"):
        dataset.patches(0)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: .*nothing is not a folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"data\.tokenizer: .* holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
