"""The user's own class: its rows are used like any others, and its mistakes are counted, not fatal."""

from __future__ import annotations

import pickle
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tetrascope.engine.data.sources.base import BadSample, Blob
from tetrascope.engine.data.sources.plugin import Plugin
from tetrascope.engine.data.store import Store
from tetrascope.errors import UserError

CODE = """
import time, types
import numpy as np

QUESTION = [{"role": "user", "content": [{"type": "image"}]}]


class Rows:
    def __init__(self, count, prefix="r"):
        self.count, self.prefix, self.users = count, prefix, 0
        self.handle = (i for i in ())  # nothing that can be pickled

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.users += 1
        time.sleep(0.001)
        together, self.users = self.users, self.users - 1
        if together > 1:
            raise RuntimeError("two threads at once")
        rows = [
            {"id": f"{self.prefix}{i}", "messages": QUESTION, "images": [b"png"]},
            {"messages": QUESTION, "image": "a.png"},
            {"conversations": [{"from": "human", "value": "<image>"}], "image": "../a.png"},
            {"tokens": [1, 2, 3], "id": 9},
            types.MappingProxyType({"tokens": np.arange(4, dtype=np.uint16), "messages": None}),
            {"tokens": [1.5]},
            {"tokens": [[1]]},
            {"tokens": [1], "messages": QUESTION},
            "no row",
            {"text": "x"},
        ]
        return rows[i]


class Shared(Rows):
    thread_safe = True


class Stamped(Rows):
    def stamp(self):
        return f"version of {self.prefix}"


class Empty:
    def __len__(self):
        return 0


class NoItems:
    def __len__(self):
        return 1


def make(count):
    return [{"id": i, "tokens": [i, i]} for i in range(count)]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "rows_of_the_user"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "broken_of_the_user.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_rows(module: str, tmp_path: Path) -> None:
    source = Plugin(f"{module}:Rows", Store(str(tmp_path)), {"count": 11, "prefix": "s"})
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert len(opened) == 11
        assert opened.stamp() == source.stamp()
        first, second = opened.record(0), opened.record(1)
        assert (first.name, first.files[0].blobs[0].data) == ("s0", b"png")
        assert (second.name, second.files[0].blobs) == ("sample 1", (Blob(str(tmp_path / "a.png")),))
        for number, name, tokens in ((3, "9", [1, 2, 3]), (4, "sample 4", [0, 1, 2, 3])):
            found = opened.record(number)
            assert found.tokens is not None and found.tokens.dtype == np.int64
            assert (found.name, found.tokens.tolist(), found.messages) == (name, tokens, None)
    with pytest.raises(IndexError):
        source.record(11)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (2, "outside root", "sample 2|a.png"),
        (5, "other", "float64"),
        (6, "other", r"shape \(1, 1\)"),
        (7, "other", "tokens and messages"),
        (8, "bad json", "sample 8"),
        (9, "bad json", "sample 9"),
        (10, "other", "sample 10: IndexError: list index out of range"),
    ],
)
def test_bad_rows_and_exceptions_name_class_and_number(
    module: str, tmp_path: Path, number: int, kind: str, message: str
) -> None:
    source = Plugin(f"{module}:Rows", Store(str(tmp_path)), {"count": 11})
    with pytest.raises(BadSample, match=message) as found:
        source.record(number)
    assert found.value.kind == kind
    assert f"{module}:Rows" in str(found.value)


def test_threads_take_turns_unless_the_class_says_otherwise(module: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        source = Plugin(f"{module}:Rows", Store(), {"count": 1})
        assert len(list(pool.map(source.record, [0] * 50))) == 50
        shared = Plugin(f"{module}:Shared", Store(), {"count": 1})
        with pytest.raises(BadSample, match="two threads at once"):
            list(pool.map(shared.record, [0] * 50))


def test_stamps(module: str) -> None:
    def stamp(name: str, **options: object) -> str:
        return Plugin(f"{module}:{name}", Store(), options).stamp()

    assert stamp("Rows", count=2) == stamp("Rows", count=2) != stamp("Rows", count=3)
    assert stamp("Rows", count=2) != stamp("Rows", count=2, prefix="x")
    assert stamp("Stamped", count=2) == "version of r"
    assert stamp("make", count=2) == stamp("make", count=2)


def test_functions_may_make_the_rows(module: str) -> None:
    source = Plugin(f"{module}:make", Store(), {"count": 3})
    assert len(source) == 3
    assert source.record(2).tokens.tolist() == [2, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("rows_of_the_user", {}, "package.module:Class"),
        ("no_such_module:Rows", {}, "cannot be imported.*no_such_module.*PYTHONPATH"),
        ("rows_of_the_user:Nothing", {}, "cannot be imported"),
        ("broken_of_the_user:Rows", {}, "ZeroDivisionError"),
        ("rows_of_the_user:Rows", {}, "missing 1 required positional argument: 'count'"),
        ("rows_of_the_user:Rows", {"count": 1, "sise": 2}, "sise"),
        ("rows_of_the_user:Rows", {"count": "x"}, "TypeError"),
        ("rows_of_the_user:Empty", {}, "holds no samples"),
        ("rows_of_the_user:NoItems", {}, "__getitem__"),
    ],
)
def test_classes_that_are_no_source(module: str, path: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plugin(path, Store(), options)
