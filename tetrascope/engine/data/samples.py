"""One drawn sample made ready: read, encoded, its pixels decoded; in this process or in a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tetrascope.engine.config import DataSection
from tetrascope.engine.data.mixture import Mixture
from tetrascope.engine.data.sources.base import BadSample
from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.engine.plan import SampleInfo
from tetrascope.errors import UserError
from tetrascope.models.family import Family, get_family


@dataclass(frozen=True)
class Task:
    """A sample by source and place in its index. pixels: whether its images are wanted too."""

    source: int
    place: int
    pixels: bool

    def __str__(self) -> str:
        return f"sample {self.place} of source {self.source}"


@dataclass(frozen=True)
class Loaded:
    """Token ids int64 `[T]`, supervision bool `[T]`, patch rows float32 `[n, P]` if they were wanted.

    failure: kind and reason where the sample could not be read; the arrays then have the planned shapes and say
    nothing.
    """

    ids_T: np.ndarray
    supervised_T: np.ndarray
    rows: np.ndarray | None
    failure: tuple[str, str] | None = None


def load_sample(mixture: Mixture, family: Family, config: Any, task: Task) -> Loaded:
    """Reads a sample. A rank that does not want its pixels reads no image, not even a header."""
    part, index = mixture.parts[task.source], mixture.indexes[task.source]
    info = index[task.place]
    try:
        record, found = part.sample(index, task.place)
    except BadSample as error:
        # The file's text is the same for all ranks, and so is this.
        ids = np.full(info.tokens, config.pad_token_id, dtype=np.int64)
        ids[: sum(one.tokens for one in info.media)] = family.visual_ids(config)[0]
        return _blank(info, config, task, ids, (error.kind, str(error)))
    try:
        rows = part.rows(record, info.media) if task.pixels and info.media else None
        return Loaded(found.ids_T, found.supervised_T, rows)
    except BadSample as error:
        # Only ranks that read pixels know; where the image's tokens are, and who gets its features, none may see
        # differently.
        return _blank(info, config, task, found.ids_T, (error.kind, str(error)))


def _blank(info: SampleInfo, config: Any, task: Task, ids_T: np.ndarray, failure: tuple[str, str]) -> Loaded:
    """A stand-in of the planned shapes: no shape on any rank may depend on what could be read where."""
    rows = np.zeros((info.patches, config.vision.patch_width), dtype=np.float32)
    wanted = task.pixels and bool(info.media)
    return Loaded(ids_T, np.zeros(info.tokens, dtype=bool), rows if wanted else None, failure)


@dataclass(frozen=True)
class SampleLoader:
    """Makes `load_sample` anew in a worker process. digests: of the indexes that tasks refer to.

    Raises UserError when the sources are no longer what they were: a task's sample would be another one.
    """

    options: DataSection
    family: str
    config: Any
    index_dir: Path
    digests: tuple[str, ...]

    def __call__(self) -> Callable[[Task], Loaded]:
        family = get_family(self.family)
        tokenizer = load_tokenizer(self.options.tokenizer)
        mixture = Mixture(self.options, family, self.config, tokenizer, self.index_dir)
        check_digests(mixture, self.digests, "while the run reads it; let files of a running run alone, and --resume")
        return sample_loader(mixture, family, self.config)


def check_digests(mixture: Mixture, expected: tuple[str, ...], why: str) -> None:
    """Raises UserError that names the first source that is not as expected."""
    for part, found, digest in zip(mixture.parts, mixture.digests(), expected, strict=True):
        if found != digest:
            raise UserError(f"data: source {part.section.name} ({part.section.path}) changed {why}")


def sample_loader(mixture: Mixture, family: Family, config: Any) -> Callable[[Task], Loaded]:
    """`load_sample` for an opened mixture."""
    return partial(load_sample, mixture, family, config)
