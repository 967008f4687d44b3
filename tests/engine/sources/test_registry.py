"""Formats by name and by sight; unknown formats and options name those there are."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tetrascope.engine.data.sources import FORMATS, open_source
from tetrascope.engine.data.store import Store
from tetrascope.errors import UserError

ROW = {"messages": [{"role": "user", "content": "x"}]}


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        info = tarfile.TarInfo("a.json")
        info.size = len(json.dumps(ROW))
        file.addfile(info, io.BytesIO(json.dumps(ROW).encode()))
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"messages": [json.dumps(ROW["messages"])]}), out)
    return out.getvalue()


CONTENT = {"JsonRows": json.dumps(ROW).encode(), "ParquetRows": parquet(), "WebDataset": tar()}
SUFFIX = {"JsonRows": ".jsonl", "ParquetRows": ".parquet", "WebDataset": ".tar"}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("place", ["local", "memory"])
def test_formats_by_name_and_by_first_bytes(tmp_path: Path, kind: str, place: str) -> None:
    for name in (f"a{SUFFIX[kind]}", "download"):
        (tmp_path / name).write_bytes(CONTENT[kind])
        url = str(tmp_path / name)
        if place == "memory":
            url = f"memory://{tmp_path.name}/{name}"
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/{name}", CONTENT[kind])
        source = open_source(url, "auto", Store(str(tmp_path)), {})
        assert type(source).__name__ == kind
        assert source.record(0).messages == ROW["messages"]


@pytest.mark.parametrize("kind", ["ParquetRows", "WebDataset"])
def test_folders(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a{SUFFIX[kind]}").write_bytes(CONTENT[kind])
    (tmp_path / "README.md").touch()
    assert type(open_source(str(tmp_path), "auto", Store(str(tmp_path)), {})).__name__ == kind
    (tmp_path / "b.parquet").touch()
    (tmp_path / "b.tar").touch()
    with pytest.raises(UserError, match=r"\.parquet, \.tar"):
        open_source(str(tmp_path), "auto", Store(str(tmp_path)), {})


def test_a_class_is_recognised() -> None:
    source = open_source("collections:UserList", "auto", Store(), {"initlist": [{"tokens": [1, 2]}]})
    assert source.record(0).tokens.tolist() == [1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "format", "options", "message"),
    [
        ("a.jsonl", "parket", {}, "'parket' is not known .did you mean parquet.*auto, llava, megatron, messages"),
        ("a.jsonl", "auto", {"cache_mb": 1}, "'cache_mb' is not known; messages takes no options"),
        ("a.parquet", "auto", {"cachemb": 1}, "did you mean cache_mb.*parquet takes cache_mb"),
        ("a.parquet", "auto", {"cache_mb": "1"}, "cache_mb is '1'; expected a whole number"),
        ("a.tar", "auto", {"threads": 0}, "threads is 0"),
        ("what", "auto", {}, "not clear"),
        ("missing", "auto", {}, "does not exist"),
        ("empty", "auto", {}, "is empty"),
    ],
)
def test_what_is_not_known(tmp_path: Path, path: str, format: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "what").write_bytes(b"something else")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / path), format, Store(str(tmp_path)), options)


def test_options_reach_the_source(tmp_path: Path) -> None:
    for kind, options in (("ParquetRows", {"cache_mb": 7}), ("WebDataset", {"threads": 2})):
        (tmp_path / "a").write_bytes(CONTENT[kind])
        assert len(open_source(str(tmp_path / "a"), "auto", Store(str(tmp_path)), options)) == 1


def test_every_format_says_what_it_is() -> None:
    assert set(FORMATS) == {"messages", "llava", "parquet", "webdataset", "megatron", "python"}
    assert all(known.what for known in FORMATS.values())


@pytest.mark.parametrize("module", ["store", "sources", "sources.base", "sources.parquet", "sources.tar"])
def test_modules_import_in_any_order(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import tetrascope.engine.data.{module}"], check=True, timeout=60)
