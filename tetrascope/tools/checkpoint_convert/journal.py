"""What of a conversion is done, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tetrascope
from tetrascope.tools.checkpoint_convert.formats import Options, Output, Reader

FILE = "journal.jsonl"


def fingerprint(reader: Reader, to: str, options: Options, outputs: Sequence[Output]) -> str:
    """Of everything that a conversion depends on: the source's files by size and time of change, what was asked for,
    and what is going to be written."""
    stats = ((path, path.stat()) for path in sorted(reader.path.rglob("*")) if path.is_file())
    source = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    content = repr((tetrascope.__version__, str(reader.path.resolve()), source, to, options, list(outputs)))
    return hashlib.sha256(content.encode()).hexdigest()


class Journal:
    """Lines of JSON in the folder that is being written: the fingerprint, then each finished file.

    A journal of another conversion counts for nothing, nor does a file that does not have its size, nor a last line
    that was cut off.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path, self._folder = folder / FILE, folder
        self.records: dict[str, dict[str, Any]] = {}
        """What is known of the finished files, by path."""
        self.same = self._read(fingerprint)
        """Whether there was a journal of this conversion."""

    def _read(self, fingerprint: str) -> bool:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        if not entries or entries[0] != {"conversion": fingerprint}:
            return False
        for entry in entries[1:]:
            path = self._folder / entry["path"]
            if path.is_file() and path.stat().st_size == entry["bytes"]:
                self.records[entry["path"]] = entry["record"]
        return True

    def begin(self, fingerprint: str) -> None:
        """Begins anew."""
        self.records.clear()
        self._append({"conversion": fingerprint})

    def add(self, path: str, record: dict[str, Any]) -> None:
        """A file is complete and on the disk."""
        self._append({"path": path, "bytes": (self._folder / path).stat().st_size, "record": record})
        self.records[path] = record

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The conversion is complete."""
        self._path.unlink()
