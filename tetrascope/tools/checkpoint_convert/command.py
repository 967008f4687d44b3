"""The command `tetrascope convert`: its options, the mapping table, the progress bar."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from tetrascope.errors import UserError
from tetrascope.models.weights import Piece
from tetrascope.tools.checkpoint_convert.convert import VERIFY, Plan, Progress, check_destination, convert, plan
from tetrascope.tools.checkpoint_convert.formats import Options, Reader, Target

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def bare_verify(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which `--verify` without a value is followed by `tensors`."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        found.append(argument)
        if argument == "--verify" and (i + 1 == len(arguments) or arguments[i + 1] not in VERIFY):
            found.append(VERIFY[0])
    return found


def parse_bytes(text: str) -> int:
    """`5GB`, `500M` or `1000000` -> bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if match is None or (count := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise UserError(f"--file-size: {text!r} is no size; write it as in 5GB or 500MB")
    return count


def run(source: Path, destination: Path, to: str, options: Options, verify: str, dry_run: bool) -> int:
    """Converts and says what was done, or with dry_run prints the mapping table. Returns the exit code."""
    for pattern in options.allow:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--allow: {pattern!r} is no regular expression ({error})") from error
    planned = plan(source, to, options)
    if dry_run:
        print_mapping(planned, Console())
        return 0
    check_destination(destination)
    with progress_bar() as progress:
        result = convert(planned, destination, verify, progress=progress)
    speed = result.nbytes / max(result.seconds, 1e-9) / 1e6
    print(
        f"{source} ({planned.source_format.name}, {planned.reader.family.name}) -> {destination} ({to}): "
        f"{result.files} files, {result.nbytes / 1e9:.3f} GB in {result.seconds:.1f} s ({speed:,.0f} MB/s)"
    )
    if result.continued:
        print(f"{result.continued} of the files were there from a conversion that had been interrupted")
    for note in (*result.notes, *([result.verified] if result.verified else [])):
        print(note)
    return 0


def print_mapping(planned: Plan, console: Console) -> None:
    """Every tensor to be written: file, name, shape, dtype, and which rows of which logical tensors it is."""
    reader = planned.reader
    table = Table(
        title=f"{reader.path} ({planned.source_format.name}, {reader.family.name}) -> {planned.format.name}",
        title_justify="left",
    )
    for column in ("file", "tensor", "shape", "dtype", "from"):
        table.add_column(column, overflow="fold")
    for output in planned.writer.outputs:
        for number, target in enumerate(output.targets):
            shape = "×".join(map(str, target.shape))
            dtype = str(target.dtype).removeprefix("torch.")
            table.add_row(output.path if number == 0 else "", target.name, shape, dtype, _origin(reader, target))
    console.print(table)
    tensors = sum(len(output.targets) for output in planned.writer.outputs)
    console.print(f"{tensors} tensors in {len(planned.writer.outputs)} files, {planned.nbytes / 1e9:.3f} GB")
    for note in reader.notes:
        console.print(note)


def _origin(reader: Reader, target: Target) -> str:
    """What a target is made of."""
    columns = "" if target.columns is None else f", columns {target.columns.start}-{target.columns.stop}"
    parts = [_rows(piece) + columns for piece in target.pieces]
    shown = parts if len(parts) <= 4 else [*parts[:3], f"… {len(parts)} parts"]
    dtypes = {reader.dtype(piece.tensor.name) for piece in target.pieces}
    text = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return " + ".join(shown) + f" ({text})" * (dtypes != {target.dtype})


def _rows(piece: Piece) -> str:
    if piece.start == 0 and piece.rows == piece.tensor.matrix[0]:
        return piece.tensor.name
    return f"{piece.tensor.name}, rows {piece.start}-{piece.start + piece.rows}"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with bytes and bytes a second on stderr, where that is a terminal; gives what is to be told of it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield told
