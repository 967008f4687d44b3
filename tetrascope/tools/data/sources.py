"""The sources of a run's configuration with their indexes, and how each index came to be."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from tetrascope.engine.config import Config
from tetrascope.engine.config_file import load_config
from tetrascope.engine.data.index import Index
from tetrascope.engine.data.mixture import DataPart, index_file, index_stem, open_index, open_part
from tetrascope.engine.data.mixture import Progress as Report
from tetrascope.engine.setup import Setup, index_folder
from tetrascope.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".tar", ".bin", ".idx")
"""What is taken for a data file where a configuration is expected."""


@dataclass(frozen=True)
class Indexed:
    """A source with its index.

    file: where the index is kept. made: whether it was made just now, in so many seconds, rather than found. earlier:
    when an index of the same source with other content or settings was made, None when there is none.
    """

    part: DataPart
    index: Index
    file: Path
    made: bool
    seconds: float
    earlier: datetime | None

    @property
    def name(self) -> str:
        return self.part.section.name


def load_run(path: Path, overrides: list[str], base: Path | None) -> Config:
    """The configuration at `path`; with `base`, that one over the data file at `path`.

    Raises UserError as `load_config` does, and for a data file without a configuration.
    """
    if base is not None:
        return load_config(base, ["data.sources=[]", f"data.train={json.dumps(str(path))}", *overrides])
    if path.suffix in DATA_SUFFIXES:
        raise UserError(f"{path}: is a data file; give the configuration of the run with --config RUN.yaml")
    return load_config(path, overrides)


def open_sources(setup: Setup, progress: Report | None = None, only: str | None = None) -> list[Indexed]:
    """Opens and indexes the sources of a run, or the one called `only`.

    Raises UserError when there is none of that name, or when one cannot be read or holds no usable sample.
    """
    options, family, config = setup.config.data, setup.family, setup.model_config
    sections = [section for section in options.all_sources() if only in (None, section.name)]
    if not sections:
        known = ", ".join(section.name for section in options.all_sources())
        raise UserError(f"--source: there is no {only!r}; the sources are {known}")
    folder = index_folder(setup.config)
    found = []
    for section in sections:
        part = open_part(section, options, family, config, setup.tokenizer)
        before = _index_times(folder, section.name)
        watch, samples = _Watch(progress), len(part.source)
        watch.pass_on(section.name, 0, samples)
        began = time.perf_counter()
        index = open_index(part, options, family, config, folder, watch)
        seconds = time.perf_counter() - began
        watch.pass_on(section.name, samples, samples)
        file = index_file(folder, section.name, index.fingerprint)
        before.pop(file, None)
        found.append(Indexed(part, index, file, watch.called, seconds, max(before.values(), default=None)))
    return found


class _Watch:
    """Passes progress on, and remembers whether there was any: an index that is found has none."""

    def __init__(self, to: Report | None) -> None:
        self._to, self.called = to, False

    def __call__(self, name: str, done: int, total: int) -> None:
        self.called = True
        self.pass_on(name, done, total)

    def pass_on(self, name: str, done: int, total: int) -> None:
        if self._to is not None:
            self._to(name, done, total)


def _index_times(folder: Path, name: str) -> dict[Path, datetime]:
    """When each index of a source was made."""
    pattern = re.compile(re.escape(index_stem(name)) + r"-[0-9a-f]{16}\.parquet")
    there = folder.iterdir() if folder.is_dir() else ()
    return {path: datetime.fromtimestamp(path.stat().st_mtime) for path in there if pattern.fullmatch(path.name)}


class _Rate(ProgressColumn):
    """Samples a second."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:,.0f} samples/s" if seconds else "", style="progress.data.speed")


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar for each source on stderr, where that is a terminal; what it gives is to be told of the progress."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def told(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield told
