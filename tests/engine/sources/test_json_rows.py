"""Rows of JSON files: every line by number, bad ones by themselves, from any store and in any process."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tetrascope.engine.data.sources.base import BadSample
from tetrascope.engine.data.sources.json_rows import JsonRows
from tetrascope.engine.data.store import Store, StoreOptions
from tetrascope.errors import UserError


def row(name: str) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": f"say {name}\u2028ä"}]}


ROWS = [row(f"r{i}") for i in range(40)]


def write_lines(path: Path) -> Path:
    """With blank lines, Windows line ends, a separator inside a string that is no line end, and no last line end."""
    lines = [json.dumps(one, ensure_ascii=False) for one in ROWS]
    path.write_bytes("\n".join([lines[0], "", lines[1] + "\r", "  ", *lines[2:]]).encode())
    return path


@pytest.fixture(params=["lines", "list", "memory lines", "memory list"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> JsonRows:
    path = tmp_path / "rows.json"
    if "lines" in request.param:
        path = write_lines(tmp_path / "rows.jsonl")
    else:
        path.write_text(json.dumps(ROWS, indent=1))
    if "memory" not in request.param:
        return JsonRows(str(path), Store(str(tmp_path)))
    fsspec.filesystem("memory").pipe_file(f"/rows/{path.name}", path.read_bytes())
    store = Store("memory://rows", StoreOptions(cache_dir=tmp_path / "cache"))
    return JsonRows(f"memory://rows/{path.name}", store)


def test_every_row_by_number_in_any_process_and_thread(source: JsonRows) -> None:
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert len(opened) == len(ROWS)
        assert opened.stamp() == source.stamp()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(opened.record, list(range(len(ROWS))) * 5))
        assert [one.name for one in found] == [one["id"] for one in ROWS] * 5
        assert [one.messages for one in found] == [one["messages"] for one in ROWS] * 5


def test_names_and_roots_come_from_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    part = {"type": "image", "image": "../x.png"}
    bad = {"messages": [{"role": "user", "content": [part]}]}
    path.write_text("\n" + json.dumps({"messages": []}) + "\n" + json.dumps(bad))
    source = JsonRows(str(path), Store(str(tmp_path)))
    assert source.record(0).name == "line 2"
    with pytest.raises(BadSample, match=r"rows\.jsonl: .*x\.png") as found:
        source.record(1)
    assert found.value.kind == "outside root"


@pytest.mark.parametrize("bad", [b"{", b"\xff\xfe{}", b"[1]", b"3", b'{"messages": 3}', b"[" * 100_000])
def test_a_bad_line_is_a_bad_sample_and_not_the_end(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + bad + b"\n" + json.dumps(ROWS[1]).encode())
    source = JsonRows(str(path), Store(str(tmp_path)))
    with pytest.raises(BadSample, match=r"rows\.jsonl.*2") as found:
        source.record(1)
    assert found.value.kind == "bad json"
    assert [source.record(i).name for i in (0, 2)] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.json", "["), ("a.json", "[" * 100_000)],
    ids=range(5),
)
def test_files_without_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        JsonRows(str(tmp_path / name), Store(str(tmp_path)))


def test_a_missing_file(tmp_path: Path) -> None:
    for url in (str(tmp_path / "no.jsonl"), "memory://nowhere/no.jsonl"):
        with pytest.raises(UserError, match=r"no\.jsonl"):
            JsonRows(url, Store(options=StoreOptions(cache_dir=tmp_path)))
