"""JSON Lines, a row a line, or one JSON list: `messages` or LLaVA's `conversations`, files by path or data: URL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tetrascope.engine.data.sources.base import BadSample, Record
from tetrascope.engine.data.sources.conversation import record
from tetrascope.engine.data.store import Store
from tetrascope.errors import UserError


class JsonRows:
    """Rows by number. Of a .jsonl file only the places of its lines are kept in memory; a .json list is kept whole.

    Raises UserError for a file that cannot be read or holds no rows; a bad line is a bad sample, not the end.
    """

    def __init__(self, url: str, store: Store) -> None:
        self._url, self._store = url, store
        path = store.local(url)
        try:
            self._rows = _json_list(path)
            self._file = path.open("rb")
            self._starts = None if self._rows is not None else _line_starts(path)
        except OSError as error:
            raise UserError(f"data: {path} cannot be read ({error.strerror}); check the path") from error
        if not len(self):
            raise UserError(f"data: {path} holds no samples")

    def __len__(self) -> int:
        return len(self._rows) if self._rows is not None else len(self._lines)

    @property
    def _lines(self) -> np.ndarray:
        return self._starts if self._starts is not None else np.zeros((0, 3), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self._url, "store": self._store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["store"])  # type: ignore[misc]

    def record(self, number: int) -> Record:
        if self._rows is not None:
            return self._record(self._rows[number], f"row {number + 1}")
        line, start, stop = (int(x) for x in self._lines[number])
        raw = os.pread(self._file.fileno(), stop - start, start)  # threads share the file
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSample("bad json", f"{self._url}:{line}: is not UTF-8 ({error}); save it as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadSample("bad json", f"{self._url}:{line}: not valid JSON ({error})") from error
        return self._record(row, f"line {line}")

    def _record(self, row: Any, place: str) -> Record:
        try:
            return record(row, place, self._store.resolve)
        except BadSample as error:
            raise BadSample(error.kind, f"{self._url}: {error}") from error

    def stamp(self) -> str:
        return self._store.stamp(self._url)


def _json_list(path: Path) -> list[Any] | None:
    """The rows of a JSON list; None when the file does not begin like one."""
    with path.open("rb") as file:
        head = file.read(4096).lstrip()
        if not head.startswith(b"[") or path.suffix == ".jsonl":
            return None
        file.seek(0)
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data: {path} is no JSON list ({error}); lines of JSON need the suffix .jsonl") from error
    return list(rows)


def _line_starts(path: Path) -> np.ndarray:
    """Line number from 1, first byte and end of every line that is not blank, int64 `[rows, 3]`."""
    found = []
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found.append((number, place, place + len(line)))
            place += len(line)
    return np.array(found, dtype=np.int64).reshape(-1, 3)
