"""Checksums of files, and what becomes of writes that find no room.

The oracles: zlib over the file as it lies on the disk, and the operating system's own errors.
"""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.checkpoint.kill import ALONE, SHAPES, read_back, shards
from tetrascope.engine.checkpoint import (
    CheckpointReader,
    DiskFull,
    Snapshot,
    checksum_problems,
    latest_checkpoint,
    newest_whole,
    problem,
    write_snapshot,
)
from tetrascope.engine.checkpoint import files as files_module
from tetrascope.engine.checkpoint.files import FileRecord, checksum, write_file
from tetrascope.engine.checkpoint.manifest import MANIFEST, read_manifest
from tetrascope.errors import UserError


def save(folder: Path, step: int) -> Path:
    return write_snapshot(folder, Snapshot(step, shards(float(step)), {"format": 1, "step": step}), ALONE)


def test_record_is_of_what_lies_on_the_disk(tmp_path: Path) -> None:
    content = os.urandom(3 * files_module.BLOCK + 17)
    record = write_file(tmp_path / "file", content)
    assert record == FileRecord(len(content), zlib.crc32(content))
    assert (tmp_path / "file").read_bytes() == content and checksum(tmp_path / "file") == record.crc32


def test_manifest_names_every_file_with_its_size_and_checksum(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != MANIFEST}
    assert set(files) == {"__0_0.distcp", ".metadata", "state.json"}
    assert read_manifest(checkpoint) == {n: FileRecord(len(b), zlib.crc32(b)) for n, b in files.items()}
    assert problem(checkpoint) is None and checksum_problems(checkpoint) == []
    assert read_back(checkpoint) == {1.0}


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """One bit of a byte here and there of each file; in the manifest, of every byte that is not white space."""
    save(tmp_path, 1)
    checkpoint = save(tmp_path, 2)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        places = range(0, len(content), 1 if path.name == MANIFEST else max(1, len(content) // 7))
        for place in places:
            if path.name == MANIFEST and content[place : place + 1].isspace():
                continue
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            found = newest_whole(tmp_path, ALONE)
            assert found.checkpoint == tmp_path / "step-000001", (path.name, place, content[place : place + 1])
            assert found.passed_over[0].startswith("step-000002 ("), found
        path.write_bytes(content)
    assert newest_whole(tmp_path, ALONE).checkpoint == checkpoint


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / MANIFEST).unlink(), "no manifest.json: it was not written to its end"),
        (lambda c: (c / ".metadata").unlink(), ".metadata cannot be read (No such file or directory)"),
        (lambda c: (c / "state.json").write_bytes(b"{"), "state.json has 1 bytes, "),
        (lambda c: (c / MANIFEST).write_bytes(b"[]"), "manifest.json cannot be read (holds no list of files"),
        (lambda c: (c / MANIFEST).write_bytes(b"\xff{"), "manifest.json cannot be read ("),
    ],
)
def test_what_is_not_whole_is_passed_over_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found = newest_whole(tmp_path, ALONE)
    assert found.checkpoint == tmp_path / "step-000001" == latest_checkpoint(tmp_path)
    assert found.passed_over[0].startswith(f"step-000002 ({reason}"), found.passed_over


class _FullDisk:
    """A disk with room for so many bytes: what torch and we write files with fails beyond them."""

    def __init__(self, room: int) -> None:
        self.room = room

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = files_module.ChecksumStream.write

        def write(stream: files_module.ChecksumStream, data: bytes) -> int:
            self.room -= memoryview(data).nbytes
            if self.room < 0:
                stream.error = stream.error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise stream.error
            return real(stream, data)

        monkeypatch.setattr(files_module.ChecksumStream, "write", write)


def test_a_full_disk_is_reported_wherever_it_strikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every seventh of what a checkpoint takes: in the tensors, the list of contents, the state, the manifest."""
    first = save(tmp_path, 1)
    total = sum(path.stat().st_size for path in first.iterdir())
    manifest = (first / MANIFEST).stat().st_size
    for room in [0, *(total * part // 7 for part in range(1, 7)), total - manifest - 1, total - 1]:
        with monkeypatch.context() as patch:
            _FullDisk(room).install(patch)
            with pytest.raises(DiskFull, match=r"step-000002: not saved, there is no room \(No space left on device\)"):
                save(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], room
    assert read_back(save(tmp_path, 2)) == {2.0}
    assert read_back(first) == {1.0}


def test_a_limit_of_the_operating_system_is_reported(tmp_path: Path) -> None:
    """Files may not grow beyond a limit (RLIMIT_FSIZE): what fails here is write(2) itself, not a stand-in."""
    first = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        with pytest.raises(DiskFull, match="File too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert read_back(first) == {1.0}


def test_other_failures_of_the_file_system_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"step-000001: not saved \(.*\); check the storage below output.dir"):
        save(tmp_path / "file", 1)


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut could tear: the order of fsync and rename, as the operating system is asked for them."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"fsync {path.name} {path.stat().st_size if path.is_file() else ''}".strip())
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    checkpoint = save(tmp_path, 1)
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    named = events.index("rename .step-000001.partial step-000001")
    for name, size in sizes.items():
        as_written = ".metadata.tmp" if name == ".metadata" else name
        assert f"fsync {as_written} {size}" in events[:named], (name, events)
    order = [f"fsync {MANIFEST} {sizes[MANIFEST]}", "fsync .step-000001.partial", events[named]]
    assert events[-4:] == [*order, f"fsync {tmp_path.name}"]


class _Foreign:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def test_a_list_of_contents_that_would_run_code_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    assert set(CheckpointReader(checkpoint).read_metadata().state_dict_metadata) == set(SHAPES)
    for content in (_Foreign(), {"a": 1}, torch.nn.Linear(1, 1)):
        (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(pickle.UnpicklingError, match=r"no place in a checkpoint|not a list of contents but a dict"):
            CheckpointReader(checkpoint).read_metadata()
