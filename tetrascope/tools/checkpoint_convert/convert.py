"""Converting a checkpoint between formats: a plan, a streaming copy of one file after the other, and a rename.

Files are written into a hidden folder beside the destination, with a journal of those that are finished; the folder
gets the destination's name when it is complete. A conversion that was interrupted goes on with the first file that is
not in the journal.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tetrascope.engine.checkpoint.files import sync_folder
from tetrascope.errors import UserError
from tetrascope.tools.checkpoint_convert.formats import DTYPES, Format, Options, Reader, Writer, get_format, recognise
from tetrascope.tools.checkpoint_convert.journal import FILE as JOURNAL
from tetrascope.tools.checkpoint_convert.journal import Journal, fingerprint
from tetrascope.tools.checkpoint_convert.native import NativeReader
from tetrascope.tools.checkpoint_convert.stream import THREADS, RowStream
from tetrascope.tools.checkpoint_convert.verify import verify_tensors

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with when the disk, the user's quota or the allowed size of a file is full."""

MARGIN = 64 << 20
"""Bytes to be free beside the tensors: tokenizers and the like."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done of it, and bytes of all of it."""

VERIFY = ("tensors", "logits")


@dataclass(frozen=True)
class Plan:
    """A conversion that is possible: source, destination's format, and the files to be written."""

    reader: Reader
    source_format: Format
    format: Format
    writer: Writer
    options: Options

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.writer.outputs)


@dataclass(frozen=True)
class Result:
    """What a conversion did. verified: what `--verify` found, empty without it. continued: files that an earlier,
    interrupted conversion had finished."""

    files: int
    nbytes: int
    seconds: float
    continued: int
    notes: tuple[str, ...]
    verified: str


def plan(source: Path, to: str, options: Options) -> Plan:
    """Opens the source and says what would be written. Reads headers only.

    Raises UserError for a source that is no checkpoint or not whole, and for a destination that cannot be.
    """
    target = get_format(to)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UserError(f"--dtype: unknown {options.dtype!r}; choose one of {', '.join(DTYPES)}")
    format_ = recognise(source)
    reader = format_.open(source, options)
    return Plan(reader, format_, target, target.writer(reader, options), options)


def check_destination(destination: Path, replace: bool = False) -> None:
    """Raises UserError unless the folder does not exist, is empty, or may be replaced: a Hugging Face folder."""
    if not destination.exists():
        return
    if replace:
        if not (destination.is_dir() and (destination / "config.json").exists()):
            raise UserError(f"{destination}: exists and is no Hugging Face folder; choose another destination")
    elif not destination.is_dir() or any(destination.iterdir()):
        raise UserError(f"{destination}: exists and is not empty; choose another destination, or remove it")


def convert(
    planned: Plan,
    destination: Path,
    verify: str = "",
    replace: bool = False,
    trust: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Carries out a plan.

    verify: `tensors` or `logits`, empty for neither. replace: an older Hugging Face folder gives way when the new one
    is complete. trust: a native source was written just now; its checksums, of moments too, are not looked at. Raises
    UserError when the destination is not empty, when there is no room, for a damaged source, and
    for a difference that `verify` found; the destination is then untouched.
    """
    if verify and verify not in VERIFY:
        raise UserError(f"--verify: unknown {verify!r}; choose one of {', '.join(VERIFY)}")
    check_destination(destination, replace)
    told = progress or (lambda what, done, total: None)
    began = time.perf_counter()
    partial = destination.with_name(f".{destination.name}.converting")
    with _explained(destination), ThreadPoolExecutor(THREADS) as pool:
        if isinstance(planned.reader, NativeReader) and not trust:
            planned.reader.check_bytes()
        continued = _write(planned, partial, pool, told)
        verified = _verify(planned, partial, verify, pool, told)
        (partial / JOURNAL).unlink()
        _publish(partial, destination)
    drift = [f"copies of {n} differed by up to {d:.3g}; mean taken" for n, d in sorted(planned.reader.drift.items())]
    return Result(
        len(planned.writer.outputs),
        planned.nbytes,
        time.perf_counter() - began,
        continued,
        (*planned.reader.notes, *drift),
        verified,
    )


def _write(planned: Plan, partial: Path, pool: ThreadPoolExecutor, told: Progress) -> int:
    """Writes all files that are not there yet. Returns how many were."""
    writer = planned.writer
    key = fingerprint(planned.reader, planned.format.name, planned.options, writer.outputs)
    journal = Journal(partial, key)
    if not journal.same:
        shutil.rmtree(partial, ignore_errors=True)
    done = sum(output.nbytes for output in writer.outputs if output.path in journal.records)
    _check_room(partial.parent, planned.nbytes - done)
    if not journal.same:
        partial.mkdir(parents=True)
        journal.begin(key)
    continued = len(journal.records)

    def add(count: int) -> None:
        nonlocal done
        done += count
        told("converting", done, planned.nbytes)

    for output in writer.outputs:
        if output.path not in journal.records:
            rows = RowStream(output, planned.reader, pool, add)
            try:
                journal.add(output.path, writer.write(output, partial, rows))
            finally:
                rows.close()
    writer.finish(partial, journal.records)
    return continued


def _verify(planned: Plan, partial: Path, verify: str, pool: ThreadPoolExecutor, told: Progress) -> str:
    """What the wanted comparison of source and destination found."""
    if not verify:
        return ""
    allow = (".*",) if planned.reader.absent else planned.options.allow
    written = planned.format.open(partial, Options(allow=allow, config=planned.options.config))
    if verify == "logits":
        from tetrascope.tools.checkpoint_convert.logits import verify_logits

        return verify_logits(planned.reader, written, exact=planned.options.dtype is None)
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        told("verifying", done, planned.nbytes)

    names = {p.tensor.name for output in planned.writer.outputs for t in output.targets for p in t.pieces}
    count = verify_tensors(planned.reader, written, names, planned.options, pool, add)
    return f"{count} tensors read back, all bit-equal"


def _check_room(folder: Path, needed: int) -> None:
    """Raises UserError when the disk has less room than that."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed + MARGIN:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, {(needed + MARGIN) / 1e9:.1f} GB needed; make room or choose another "
            "destination"
        )


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """Turns errors of the file system into ones with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise UserError(
                f"{destination}: no room ({error.strerror}); make some and run the same command again, which goes on "
                "after the files that are finished"
            ) from error
        raise UserError(f"{destination}: not written ({error}); check the storage and run again") from error


def _publish(partial: Path, destination: Path) -> None:
    """Makes sure that all is on the disk, then gives the folder its name."""
    for folder, _, files in os.walk(partial):
        for name in files:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(folder))
    old = destination.with_name(f".{destination.name}.old")
    if destination.exists():
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
    partial.rename(destination)
    sync_folder(destination.parent)
    shutil.rmtree(old, ignore_errors=True)
