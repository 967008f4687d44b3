"""Sources opened and indexed: what is wrong with a sample is found from headers and text, counted and named.

Pixels are the exception: only headers are read when an index is made. An index is made once; what it depends on is
changed here piece by piece, and the file must be found again or made anew accordingly.
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
from tetrascope.engine.config import DataSection
from tetrascope.engine.config_file import validated
from tetrascope.engine.data.index import Bad, build_index, load_index
from tetrascope.engine.data.mixture import Mixture, index_file
from tetrascope.engine.data.samples import SampleLoader, Task, load_sample
from tetrascope.engine.data.skipped import Skip, SkipLog
from tetrascope.engine.data.tokenizer import load_tokenizer
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
    folder = tmp_path_factory.mktemp("mixture") / "tokenizer"
    write_tokenizer(folder)
    return folder


class Folder:
    """A folder with a data file and pictures a.png (90x60 pixels) and b.png (56x56)."""

    def __init__(self, root: Path, tokenizer_folder: Path) -> None:
        self.root, self.file, self.indexes = root, root / "train.jsonl", root / "indexes"
        self._tokenizer_folder, self._tokenizer = tokenizer_folder, load_tokenizer(tokenizer_folder)
        self.config = validated(FAMILY.config_class, FAMILY.complete(SHAPES, self._tokenizer), "model.config")
        for name, size in (("a.png", (90, 60)), ("b.png", (56, 56))):
            picture(*size).save(root / name)

    def write(self, *lines: Any, name: str = "train.jsonl") -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.root / name).write_text("\n".join(texts), encoding="utf-8")

    def open(self, **options: Any) -> Mixture:
        where = {} if "sources" in options else {"train": self.file}
        section = DataSection(**where, tokenizer=self._tokenizer_folder, **options)
        return Mixture(section, FAMILY, self.config, self._tokenizer, self.indexes)

    def load(self, mixture: Mixture, place: int, pixels: bool = True) -> Any:
        return load_sample(mixture, FAMILY, self.config, Task(0, place, pixels))


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Folder:
    return Folder(tmp_path, tokenizer_folder)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(name: str, *images: Any, answer: str = "yes") -> dict[str, Any]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "q"}]
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def turns(name: str, count: int, image_at: int | None = None) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    for i in range(count):
        image = [{"type": "image", "image": "a.png"}] if i == image_at else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": f"question {i}"}]})
        messages.append({"role": "assistant", "content": f"answer {i}"})
    return {"id": name, "messages": messages}


def test_samples_with_their_images(folder: Folder) -> None:
    folder.write(sample("two", "a.png", "b.png"), "", sample("text"))
    mixture = folder.open()
    (index,) = mixture.indexes
    assert len(mixture) == len(index) == 2 and not index.bad
    # 60x90 pixels round to 56x84: 4x6 patches, 2x3 visual tokens; 56x56 gives 4x4 patches, 2x2.
    assert [one.grid for one in index[0].media] == [(1, 4, 6), (1, 4, 4)] and index[0].patches == 40
    two, text = folder.load(mixture, 0), folder.load(mixture, 1)
    assert (two.ids_T == folder.config.image_token_id).sum() == 10
    assert index[0].tokens == len(two.ids_T) == len(two.supervised_T)
    assert index[0].supervised == two.supervised_T.sum() >= 2  # the answer and the end of its turn
    assert two.rows.shape == (40, 1176) and two.failure is None
    assert text.rows is None and index[1].media == () and mixture.name_of(0, 1) == ("train", 1)


def test_a_rank_that_does_not_encode_reads_no_image(folder: Folder) -> None:
    folder.write(sample("x", "a.png"))
    mixture = folder.open()
    (folder.root / "a.png").unlink()
    assert folder.load(mixture, 0, pixels=False).failure is None
    kind, reason = folder.load(mixture, 0).failure
    assert kind == "missing file" and "a.png does not exist" in reason


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("{", "bad json", "train.jsonl:3: not valid JSON"),
        ("[]", "bad json", "expected an object with messages or conversations"),
        ('{"id": "x"}', "bad json", 'x: expected an object with a list "messages"'),
        (sample("x", "none.png"), "missing file", "sample x: .*none.png does not exist"),
        (sample("x", "text.png"), "not an image", "sample x: image .*text.png is not readable"),
        (sample("x", None), "bad json", 'x: "image" is None; expected the path of a file'),
        (sample("x", "/etc/passwd"), "outside root", "/etc/passwd leads out of"),
        (sample("x", "thin.png"), "other", "sample x: image .*thin.png: image of 5000x20 pixels: .*aspect ratio"),
        (sample("x", "small.png"), "other", "has 13x200 pixels, less than the encoder's patches of 14x14"),
        ({"id": "x", "messages": [{"role": "user", "content": "q"}]}, "nothing to learn", "no assistant text"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "bad json", "sample line 3: message role 'boss'"),
        (sample("x", "a.png", answer="<|image_pad|>"), "bad json", "conversation has 2 image places but 1 images"),
    ],
)
def test_what_is_wrong_is_counted_by_kind_and_named(folder: Folder, line: Any, kind: str, message: str) -> None:
    (folder.root / "text.png").write_text("no picture")
    picture(5000, 20).save(folder.root / "thin.png")
    picture(13, 200).save(folder.root / "small.png")
    folder.write(sample("good", "a.png"), "", line)
    (index,) = folder.open().indexes
    assert len(index) == 1 and [bad.kind for bad in index.bad] == [kind]
    assert re.search(message, index.bad[0].reason), index.bad[0].reason


def test_files_that_are_no_data(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl"):
        folder.open()
    folder.write("", "  ")
    with pytest.raises(UserError, match="holds no samples"):
        folder.open()
    folder.write("{")
    with pytest.raises(UserError, match=r"none of the 1 samples can be used; first: .*not valid JSON"):
        folder.open()


def test_an_index_is_made_once_and_anew_when_anything_changes(folder: Folder) -> None:
    def files() -> set[str]:
        return {path.name for path in folder.indexes.glob("*.parquet")}

    folder.write(sample("one", "a.png"), sample("two"))
    first = folder.open().indexes[0]
    made = files()
    (file,) = folder.indexes.glob("*.parquet")
    written = file.stat().st_mtime_ns
    again = folder.open().indexes[0]
    assert file.stat().st_mtime_ns == written and files() == made
    assert list(again) == list(first) and again.media == first.media == [(GRID_4_6,), ()]
    for changed in ({"max_pixels": 2000}, {"max_tokens": 100}, {"overlong": "drop"}):
        folder.open(**changed)
        assert len(files() - made) == 1, changed
        made = files()
    folder.write(sample("one", "a.png"), sample("two"), sample("three"))
    assert len(folder.open()) == 3
    file.write_bytes(file.read_bytes()[:-100])
    assert load_index(file, first.fingerprint) is None  # damaged: made anew


def test_several_workers_make_the_same_index(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from tetrascope.engine.data import mixture

    lines = [sample(f"s{i}", *(["a.png"] * (i % 3)), answer="y" * (1 + i % 7)) for i in range(20)]
    folder.write(*lines[:10], "{", *lines[10:])
    alone = folder.open(index_workers=1).indexes[0]
    monkeypatch.setattr(mixture, "FEW", 0)
    monkeypatch.setattr(mixture, "CHUNK", 4)
    folder.indexes = folder.root / "others"
    several = folder.open(index_workers=2).indexes[0]
    assert list(several) == list(alone) and several.bad == alone.bad and len(alone.bad) == 1
    assert all(np.array_equal(several.columns[name], alone.columns[name]) for name in alone.columns)


class Tokens:
    """A source of tokenized text: `cut` at the borders of samples that a packing of its own made."""

    def __init__(self, samples: list[list[int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"tokens": self.samples[number]}


@pytest.mark.parametrize("overlong", ["error", "split"])
def test_an_image_cut_by_a_packing_of_the_users_own(folder: Folder, overlong: str) -> None:
    """Placeholders without an image: inside, at the start, at the end of a sample; a text beside them is whole."""
    image = folder.config.image_token_id
    samples = [[1, 2, 3], [1, 2, 3, 4, *[image] * 3, 5], [*[image] * 2, 5, 6], [7, 8, *[image] * 4], [image] * 3]
    options = {"samples": samples}
    source = {"path": f"{__name__}:Tokens", "format": "python", "options": options, "name": "packed"}
    (index,) = folder.open(sources=[source], overlong=overlong, max_tokens=5).indexes
    assert len(index) == 1 and index[0].tokens == 3 and len(index.bad) == 4
    inside, begins, ends, all_of_it = (bad.reason for bad in index.bad)
    assert re.search(
        r"sample 1: tokens \[4, 7\) stand for an image or video, but .*; give the conv.* tokens \[0, 4\)", inside
    )
    assert re.search(r"sample 2: tokens \[0, 2\) .* that begins before the sample, but .* tokens \[2, 4\)$", begins)
    assert re.search(r"sample 3: tokens \[2, 6\) .* that goes on after it, but .* tokens \[0, 2\)$", ends)
    assert re.search(r"tokens \[0, 3\) .* that begins before the sample and one that goes on after it, but", all_of_it)


def test_an_over_long_sample_is_an_error_dropped_or_split(folder: Folder) -> None:
    folder.write(sample("short"), turns("long", 6, image_at=3))
    whole = folder.open().indexes[0]
    limit = whole[1].tokens // 2
    (told,) = folder.open(max_tokens=limit).indexes[0].bad
    assert told.kind == "too long" and f"sample long: {whole[1].tokens} tokens" in told.reason
    dropped = folder.open(max_tokens=limit, overlong="drop").indexes[0]
    assert [bad.kind for bad in dropped.bad] == ["dropped"] and len(dropped) == 1

    mixture = folder.open(max_tokens=limit, overlong="split")
    (index,) = mixture.indexes
    (told,) = index.bad
    assert told.kind == "split" and len(index) >= 3 and all(info.tokens <= limit for info in index)
    loaded = [folder.load(mixture, place) for place in range(1, len(index))]
    assert all(one.failure is None for one in loaded)
    decode = load_tokenizer(mixture.options.tokenizer).decode
    texts = [decode(one.ids_T.tolist(), skip_special_tokens=False) for one in loaded]
    for i in range(6):  # every exchange once, question and answer together, the picture with its question
        (holder,) = [text for text in texts if f"question {i}" in text]
        assert f"answer {i}" in holder and ("<|image_pad|>" in holder) == ("question 3" in holder)
    assert all(text.startswith("<|im_start|>system\ns<|im_end|>") for text in texts)
    learned = sum(int(one.supervised_T.sum()) for one in loaded)
    assert learned == whole[1].supervised


def test_a_sample_that_changes_under_the_run_keeps_its_shape(folder: Folder) -> None:
    folder.write(sample("x", "a.png"), sample("y"))
    mixture = folder.open()
    planned = mixture.indexes[0][0]
    whole = (folder.root / "a.png").read_bytes()
    for change in (
        lambda: (folder.root / "a.png").write_bytes(whole[: len(whole) // 2]),
        lambda: picture(200, 200).save(folder.root / "a.png"),
        lambda: folder.file.write_bytes(b"?" * folder.file.stat().st_size),
    ):
        change()
        blank = folder.load(mixture, 0)
        assert blank.failure is not None
        assert len(blank.ids_T) == planned.tokens and not blank.supervised_T.any()
        assert (blank.ids_T == folder.config.image_token_id).sum() == planned.media[0].tokens
        assert blank.rows.shape == (planned.patches, 1176) and not blank.rows.any()
        (folder.root / "a.png").write_bytes(whole)


def test_several_sources_with_their_own_settings(folder: Folder) -> None:
    folder.write(sample("one", "a.png"), name="one.jsonl")
    folder.write(*[sample(f"t{i}") for i in range(3)], name="text.jsonl")
    mixture = folder.open(
        sources=[
            {"path": str(folder.root / "one.jsonl"), "weight": 2.0, "min_pixels": 50176},
            {"path": str(folder.root / "text.jsonl"), "name": "words", "shuffle": False},
        ]
    )
    assert [(s.name, s.weight, s.shuffle, len(s.infos)) for s in mixture.for_planner()] == [
        ("one", 2.0, True, 1),
        ("words", 1.0, False, 3),
    ]
    assert mixture.indexes[0][0].patches >= 256  # enlarged, by the source's own bound
    with pytest.raises(UserError, match="two sources are called 'one'"):
        validated(
            DataSection,
            {"tokenizer": "t", "sources": [{"path": "a/one.jsonl"}, {"path": "b/one.jsonl"}]},
            "config",
        )


def test_skipped_samples_are_written_once_bounded_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "skipped.jsonl"
    log = SkipLog(file, samples=1000, bound=0.002)
    skips = [Skip("bad json", "a", 1, "r1"), Skip("dropped", "a", 2, "r2"), Skip("missing file", "b", 1, "r3", 7)]
    assert log.add(skips) == skips and len(log) == 2  # dropped by choice: named, not counted
    assert log.add(skips[:1]) == []
    lines = file.read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["r1", "r2", "r3"]
    later = SkipLog(None, samples=1000, bound=0.002)
    later.restore([*lines, '{"kind": "cut'], step=8, left_out=skips[:2])
    assert len(later) == 2 and later.add(skips) == []
    with pytest.raises(UserError, match=r"3 samples cannot be used, more than the 2 that 0\.002 allows .*bad json: 2"):
        later.add([Skip("bad json", "b", 9, "r4")])
    assert SkipLog(None, 1000, 3)._limit == 3


def test_a_resumed_run_forgets_what_was_repaired_or_will_be_met_again(tmp_path: Path) -> None:
    """What broke the bound, and was repaired as the message asks, must not break it again before the first step."""
    file = tmp_path / "skipped.jsonl"
    repaired, broken = Skip("bad json", "a", 1, "r1"), Skip("bad json", "a", 2, "r2")
    before, after = Skip("missing file", "b", 1, "r3", 6), Skip("missing file", "b", 2, "r4", 7)
    with pytest.raises(UserError, match="4 samples cannot be used"):
        SkipLog(file, 1000, 3).add([repaired, broken, before, after])
    with file.open("a") as lines:
        lines.write('{"kind": "cut')  # killed while it wrote
    log = SkipLog(file, 1000, 3)
    log.restore(file.read_text().split("\n"), step=7, left_out=[broken])
    log.rewrite()
    assert log.add([broken]) == [] and log.seen() == [broken, before]
    assert log.add([after]) == [after]
    assert [json.loads(line)["reason"] for line in file.read_text().splitlines()] == ["r2", "r3", "r4"]


def test_names_that_are_no_text_can_be_written(folder: Folder, tmp_path: Path) -> None:
    """JSON may hold half of a character, and names of files any byte."""
    name = "\udcff\ud800"
    row = {"id": name, "messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so " * 99}]}
    missing = {"id": name, "messages": [{"role": "user", "content": [{"type": "image", "image": f"{name}.png"}]}]}
    folder.write(sample("x"), row, missing)
    left_out = folder.open(max_tokens=100, overlong="drop").left_out()
    assert [skip.kind for skip in left_out] == ["dropped", "missing file"]
    SkipLog(tmp_path / "skipped.jsonl", 3, 3).add(left_out)
    assert "ud800" in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8")


def test_an_index_with_very_many_bad_samples_is_found_again(tmp_path: Path) -> None:
    """Arrow reads no more than 100 MB of metadata unless it is told to."""
    bad = [Bad(number, "dropped", f"sample {number}: {'long ' * 100}") for number in range(250_000)]
    made = build_index([([(0, 0, 0, 9, 5, ())], bad)], "mark")
    made.save(tmp_path / "index.parquet")
    found = load_index(tmp_path / "index.parquet", "mark")
    assert found is not None and found.bad == bad and found.digest() == made.digest()
    assert (tmp_path / "index.parquet").stat().st_size < 10_000_000


def test_a_worker_that_finds_other_samples_does_not_take_them_for_the_runs(folder: Folder) -> None:
    folder.write(sample("x"), sample("y"))
    mixture = folder.open()
    make = SampleLoader(mixture.options, FAMILY.name, folder.config, folder.indexes, mixture.digests())
    assert make()(Task(0, 1, True)).failure is None
    folder.write(sample("y"))
    with pytest.raises(UserError, match=r"source train .* changed while the run reads it"):
        make()


def test_an_index_stays_in_its_folder_whatever_the_source_is_called(tmp_path: Path) -> None:
    assert index_file(tmp_path, "../../a/b", "0" * 64).parent == tmp_path
    assert index_file(tmp_path, "../../a/b", "0" * 64).name == "..-..-a-b-0000000000000000.parquet"
