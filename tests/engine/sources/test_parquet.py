"""Parquet: every column form and place of files gives the rows that were written, and no more is read than needed.

The oracle is the list of rows that the files are written from.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tetrascope.engine.data.sources import parquet as parquet_module
from tetrascope.engine.data.sources.base import BadSample, Blob
from tetrascope.engine.data.sources.parquet import ParquetRows
from tetrascope.engine.data.store import Store, StoreOptions
from tetrascope.errors import UserError

COUNT = 23
BYTES = [b"image %d " % i * 50 for i in range(COUNT)]
MESSAGES = [
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {i}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"It is {i}."}]},
    ]
    for i in range(COUNT)
]
LLAVA = [
    [{"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]
    for i in range(COUNT)
]
TEXTS = {
    "structs": {"messages": MESSAGES},
    "json": {"messages": [json.dumps(one) for one in MESSAGES]},
    "llava": {"conversations": LLAVA},
    "llava json": {"conversations": [json.dumps(one) for one in LLAVA]},
}
IMAGES: dict[str, dict[str, list[Any]]] = {
    "structs": {"image": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(BYTES)]},
    "lists of structs": {"images": [[{"bytes": data, "path": None}] for data in BYTES]},
    "bytes": {"image": BYTES},
    "lists of bytes": {"images": [[data] for data in BYTES]},
}


def write(path: Path, columns: dict[str, list[Any]], rows: slice = slice(None), group: int = 4) -> None:
    ids = list(range(COUNT))[rows]
    other = [os.urandom(10_000) for _ in ids]  # a column that nobody asks for
    table = pa.table({"id": ids, "other": other, **{name: values[rows] for name, values in columns.items()}})
    pq.write_table(table, path, row_group_size=group)


def open_rows(path: Path | str, root: Path, **options: Any) -> ParquetRows:
    return ParquetRows(str(path), Store(str(root)), **options)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("texts", TEXTS)
def test_columns_of_every_form(tmp_path: Path, texts: str, images: str) -> None:
    write(tmp_path / "a.parquet", {**TEXTS[texts], **IMAGES[images]})
    source = open_rows(tmp_path / "a.parquet", tmp_path)
    assert len(source) == COUNT
    for i in (0, 3, 4, 22):
        found = source.record(i)
        assert found.name == str(i)
        question = (found.messages or [])[0]["content"]
        assert [part["type"] for part in question] == ["image", "text"]
        assert set(question[0]) == {"type", "image"}
        assert question[1] == {"type": "text", "text": f"What is {i}?"}  # without the None that Arrow fills in
        assert (found.messages or [])[1]["content"] == [{"type": "text", "text": f"It is {i}."}]
        assert [blob.data for file in found.files for blob in file.blobs] == [BYTES[i]]


def test_paths_are_bounded_by_the_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    paths = ["a.png"] * 21 + ["../out.png", "/etc/hostname"]
    for column in ({"image": paths}, {"images": [[{"bytes": None, "path": path}] for path in paths]}):
        write(tmp_path / "data" / "a.parquet", {**TEXTS["structs"], **column})
        source = open_rows(tmp_path / "data" / "a.parquet", tmp_path / "data")
        assert source.record(0).files[0].blobs == (Blob(str(tmp_path / "data" / "a.png")),)
        for i in (21, 22):
            with pytest.raises(BadSample) as found:
                source.record(i)
            assert found.value.kind == "outside root"


def test_videos_and_text_only(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "?"}]}]] * COUNT
    write(tmp_path / "a.parquet", {"messages": turns, "videos": [[{"bytes": data, "path": None}] for data in BYTES]})
    (file,) = open_rows(tmp_path / "a.parquet", tmp_path).record(5).files
    assert (file.kind, file.blobs[0].data) == ("video", BYTES[5])
    plain = [[{"role": "user", "content": f"say {i}"}] for i in range(COUNT)]
    write(tmp_path / "b.parquet", {"messages": plain})
    found = open_rows(tmp_path / "b.parquet", tmp_path).record(6)
    assert (found.messages, found.files) == ([{"role": "user", "content": "say 6"}], ())


@pytest.mark.parametrize("path", ["", "*.parquet", "part-{0..2}.parquet", "part-{0,1,2}.parquet"])
@pytest.mark.parametrize("remote", [False, True])
def test_several_files_are_one_source(tmp_path: Path, path: str, remote: bool) -> None:
    columns = {**TEXTS["structs"], **IMAGES["bytes"]}
    for part, rows in enumerate((slice(0, 9), slice(9, 9), slice(9, COUNT))):
        write(tmp_path / f"part-{part}.parquet", columns, rows)
    (tmp_path / "README.md").write_text("no rows")
    store, place = Store(str(tmp_path)), str(tmp_path / path)
    if remote:
        memory = fsspec.filesystem("memory")
        for file in tmp_path.iterdir():
            memory.pipe_file(f"/{tmp_path.name}/{file.name}", file.read_bytes())
        place = f"memory://{tmp_path.name}/{path}".rstrip("/")
        store = Store(f"memory://{tmp_path.name}")
    source = ParquetRows(place, store)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.stamp() == source.stamp()
    for opened in (source, copy):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(opened.record, [*range(COUNT), *reversed(range(COUNT))]))
        assert [one.name for one in found] == [str(i) for i in [*range(COUNT), *reversed(range(COUNT))]]
        assert [one.files[0].blobs[0].data for one in found] == BYTES + BYTES[::-1]
    assert source.blocks() == [range(a, b) for a, b in ((0, 4), (4, 8), (8, 9), (9, 13), (13, 17), (17, 21), (21, 23))]
    with pytest.raises(IndexError):
        source.record(COUNT)


def test_remote_files_are_read_in_ranges(tmp_path: Path) -> None:
    """Of ten groups and a large column that is not needed, one group of the others: a small part of the file."""
    data = [b"%d" % i * 5000 for i in range(COUNT)]
    write(tmp_path / "a.parquet", {**TEXTS["json"], "image": data}, group=2)
    fsspec.filesystem("memory").pipe_file("/ranges/a.parquet", (tmp_path / "a.parquet").read_bytes())
    size = (tmp_path / "a.parquet").stat().st_size
    read: list[int] = []

    class Counted(Store):
        def read(self, blob: Blob) -> bytes:
            found = super().read(blob)
            read.append(len(found))
            return found

    source = ParquetRows("memory://ranges/a.parquet", Counted("memory://ranges"))
    footer = sum(read)
    assert source.record(11).files[0].blobs[0].data == data[11]
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(5)
    wanted = sum(group.column(i).total_compressed_size for i in range(group.num_columns) if i != 1)
    assert sum(read) - footer == wanted < size / 5


def test_a_row_group_is_read_once_while_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", {**TEXTS["structs"], **IMAGES["bytes"]})
    source = open_rows(tmp_path / "a.parquet", tmp_path)
    read: list[int] = []
    real = ParquetRows._read

    def counted(self: ParquetRows, file: int, group: int) -> pa.Table:
        read.append(group)
        time.sleep(0.01)  # so that threads meet
        return real(self, file, group)

    monkeypatch.setattr(ParquetRows, "_read", counted)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(source.record, [0, 1, 2, 3] * 4))
    for i in [*range(COUNT), *range(COUNT)]:
        source.record(i)
    assert read == [0, 1, 2, 3, 4, 5]
    size = real(source, 0, 0).nbytes
    source._cache = parquet_module._Recent(2 * size + size // 2)  # two groups fit
    read.clear()
    for group in (0, 1, 0, 2, 0, 1):
        source.record(4 * group)
    assert read == [0, 1, 2, 1]  # 1 was used longest ago when 2 came
    source._cache = parquet_module._Recent(1)  # none fits: the one in use is kept all the same
    read.clear()
    for i in (0, 1, 4, 5, 0):
        source.record(i)
    assert read == [0, 1, 0]


def test_a_damaged_row_group_is_bad_samples_and_may_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, {**TEXTS["json"], **IMAGES["bytes"]})
    whole = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata.row_group(1)
    start = min(metadata.column(i).dictionary_page_offset or metadata.column(i).data_page_offset for i in (0, 2, 3))
    path.write_bytes(whole[:start] + b"\xff" * 4000 + whole[start + 4000 :])
    source = open_rows(path, tmp_path)
    for i in (4, 4, 7):
        with pytest.raises(BadSample, match="row group 1") as found:
            source.record(i)
        assert found.value.kind == "other"
    path.write_bytes(whole)
    assert source.record(4).name == "4"


def test_bad_json_in_a_column(tmp_path: Path) -> None:
    columns = {"messages": ["[{", "3", None, *("[]" for _ in range(COUNT - 3))]}
    write(tmp_path / "a.parquet", columns)
    source = open_rows(tmp_path / "a.parquet", tmp_path)
    for i in range(3):
        with pytest.raises(BadSample, match=r"a\.parquet") as found:
            source.record(i)
        assert found.value.kind == "bad json"
    assert source.record(3).messages == []


def test_files_that_are_no_source(tmp_path: Path) -> None:
    write(tmp_path / "columns.parquet", {"text": ["x"] * COUNT})
    write(tmp_path / "rows.parquet", TEXTS["json"], slice(0, 0))
    write(tmp_path / "cut.parquet", TEXTS["json"])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-100])
    (tmp_path / "page.parquet").write_text("<html>")
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "folder").mkdir()
    for name, message in {
        "columns.parquet": "no column messages or conversations, only id, other, text",
        "rows.parquet": "holds no samples",
        "cut.parquet": "not readable as Parquet",
        "page.parquet": "not readable as Parquet",
        "empty.parquet": "not readable as Parquet",
        "missing.parquet": "cannot be read",
        "folder": "holds no .parquet files",
        "nothing-*.parquet": "holds no .parquet files",
        "a-{5..1}.parquet": "ends before it begins",
    }.items():
        with pytest.raises(UserError, match=message):
            open_rows(tmp_path / name, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        ParquetRows("memory://nowhere/a.parquet", Store(options=StoreOptions(retries=0)))


def test_the_stamp_changes_with_any_file(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.parquet", TEXTS["json"])
    before = open_rows(tmp_path, tmp_path).stamp()
    write(tmp_path / "b.parquet", TEXTS["json"], slice(0, 5))
    assert open_rows(tmp_path, tmp_path).stamp() != before
