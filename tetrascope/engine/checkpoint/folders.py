"""The folder of checkpoints: names, what is whole in it, what is kept of it, what a killed run left behind.

`step-000123` is a checkpoint. Names with a leading dot are none: `.step-000123.partial` is being written,
`.step-000123.deleted` is being deleted, `.step-000123.old` gives way to a new one of the same step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tetrascope.engine.checkpoint.manifest import checksum_problems, problem, shares
from tetrascope.engine.checkpoint.ranks import Ranks


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint after so many steps."""
    return f"step-{step:06d}"


def beside(checkpoint: Path, suffix: str) -> Path:
    """The hidden folder beside a checkpoint: `partial`, `deleted` or `old`."""
    return checkpoint.with_name(f".{checkpoint.name}.{suffix}")


def checkpoints(folder: Path) -> dict[int, Path]:
    """All folders with a checkpoint's name, whole or not, by step, ascending."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))}
    return dict(sorted(found.items()))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files have the names and sizes of its manifest, or None. Reads no file's contents."""
    return next((path for path in reversed(checkpoints(folder).values()) if problem(path) is None), None)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a folder, None without one, and why newer ones are not."""

    checkpoint: Path | None
    passed_over: tuple[str, ...]


def newest_whole(folder: Path, ranks: Ranks) -> Found:
    """Looks for the newest checkpoint whose every byte is as it was written; every rank calls it.

    Sizes are checked by rank 0, checksums by all ranks, each reading its share of the files.
    """
    passed_over: list[str] = []
    for path, wrong in ranks.first(lambda: [(p, problem(p)) for p in reversed(checkpoints(folder).values())]):
        problems = [wrong] if wrong else _damaged(path, ranks)
        if not problems:
            return Found(path, tuple(passed_over))
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        passed_over.append(f"{path.name} ({problems[0]}{more})")
    return Found(None, tuple(passed_over))


def _damaged(checkpoint: Path, ranks: Ranks) -> list[str]:
    try:
        found = checksum_problems(checkpoint, shares(checkpoint, ranks.size)[ranks.rank])
    except (OSError, ValueError) as error:  # this rank does not see what rank 0 sees
        found = [f"rank {ranks.rank} cannot read it ({error})"]
    return [wrong for of_rank in ranks.gather(found) for wrong in of_rank]


def kept(steps: Collection[int], written: int, keep_last: int, keep_every: int | None) -> set[int]:
    """Which of the whole checkpoints stay: the last `keep_last`, multiples of `keep_every`, the one just written."""
    newest = sorted(steps)[-keep_last:]
    return {written, *newest, *(step for step in steps if keep_every and step % keep_every == 0)}


def prune(folder: Path, written: int, keep_last: int, keep_every: int | None) -> list[Path]:
    """Deletes the checkpoints that are not `kept`; returns their paths. Those that are not whole are left to the user.

    A checkpoint loses its name before its files, so that what is half deleted is never taken for one.
    """
    whole = {step: path for step, path in checkpoints(folder).items() if problem(path) is None}
    staying = kept(whole, written, keep_last, keep_every)
    gone = [path for step, path in whole.items() if step not in staying]
    for path in gone:
        doomed = beside(path, "deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return gone


def tidy(folder: Path) -> None:
    """Removes what a killed run left half done. One process calls it, while none writes."""
    for path in folder.glob(".step-*.old"):
        name = path.name[1:].removesuffix(".old")
        if not (folder / name).exists():  # killed before the new one took its place
            path.rename(folder / name)
    for suffix in ("partial", "deleted", "old"):
        for path in folder.glob(f".step-*.{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
