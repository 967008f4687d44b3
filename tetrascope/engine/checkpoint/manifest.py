"""`manifest.json`: the files of a checkpoint with their sizes and checksums. A folder without it is not whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tetrascope.engine.checkpoint.files import FileRecord, checksum, write_file

MANIFEST = "manifest.json"
ALGORITHM = "crc32"
THREADS = 4
"""Files that a rank checks at once: the checksum of one runs while another is read."""


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Writes the manifest; the last file of a checkpoint."""
    entries = {name: {"bytes": r.bytes, ALGORITHM: f"{r.crc32:08x}"} for name, r in sorted(files.items())}
    write_file(folder / MANIFEST, json.dumps({"files": entries}, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Raises ValueError that says what is wrong with it, OSError when there is none."""
    content = json.loads((folder / MANIFEST).read_bytes())
    try:
        return {
            str(name): FileRecord(int(entry["bytes"]), int(entry[ALGORITHM], 16))
            for name, entry in content["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"holds no list of files: {error!r}") from error


def problem(folder: Path) -> str | None:
    """What a look at names and sizes finds wrong with a checkpoint, None when it is as it was written."""
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written to its end"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != record.bytes:
            return f"{name} has {size} bytes, {record.bytes} were written"
    return None


def checksum_problems(folder: Path, share: Sequence[str] | None = None) -> list[str]:
    """Reads files of a checkpoint; those whose bytes are not what was written, with what is wrong.

    share: the files to read, None for all. `problem` has found nothing before.
    """
    files = read_manifest(folder)

    def check(name: str) -> str | None:
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        same = found == files[name].crc32
        return None if same else f"{name} has checksum {found:08x}, {files[name].crc32:08x} was written"

    with ThreadPoolExecutor(THREADS) as threads:
        return [wrong for wrong in threads.map(check, files if share is None else share) if wrong]


def shares(folder: Path, ranks: int) -> list[list[str]]:
    """The files of a checkpoint dealt out to so many ranks, evenly by size: the next largest to who has least."""
    files = read_manifest(folder)
    dealt: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = loads.index(min(loads))
        dealt[least].append(name)
        loads[least] += files[name].bytes
    return dealt
