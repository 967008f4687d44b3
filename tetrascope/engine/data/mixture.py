"""The sources of a run, opened and indexed: sample by number, ready for a step.

An index is made once for a source and its settings, by several processes where it is large, and kept in a file that
all ranks and later runs read.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from tetrascope.engine.config import DataSection, SourceSection
from tetrascope.engine.data.decode.cache import DecodeCache
from tetrascope.engine.data.decode.images import pick_decoder
from tetrascope.engine.data.encode import Encoded, Encoder, part_of
from tetrascope.engine.data.index import Bad, Index, build_index, fingerprint, index_rows, load_index
from tetrascope.engine.data.reader import MediaReader
from tetrascope.engine.data.skipped import Skip
from tetrascope.engine.data.sources import open_source
from tetrascope.engine.data.sources.base import BadSample, Record, Source
from tetrascope.engine.data.store import Store, StoreOptions, is_remote
from tetrascope.engine.data.tokenizer import load_tokenizer, tokenizer_files
from tetrascope.engine.plan import SourceIndex
from tetrascope.errors import UserError
from tetrascope.models.family import Family, get_family
from tetrascope.models.media import MEDIA_OPTIONS, Media

CHUNK = 256
"""Records that a worker indexes at a time."""

FEW = 2048
"""Up to so many records, starting processes costs more than it saves."""

Progress = Callable[[str, int, int], None]
"""Source name, records indexed so far, records in all."""


@dataclass(frozen=True)
class DataPart:
    """An opened source: its samples and how they are encoded."""

    section: SourceSection
    source: Source
    encoder: Encoder

    def sample(self, index: Index, place: int) -> tuple[Record, Encoded]:
        """An indexed sample, encoded anew without a look at its images: these are taken to be as they were indexed.

        Raises BadSample when it is no longer what the index says.
        """
        row = index.row(place)
        record = part_of(self.source.record(row.number), row.first, row.last)
        found = self.encoder.encode(record, row.info.media)
        if (len(found.ids_T), found.targets) != (row.info.tokens, row.info.supervised):
            raise BadSample("changed", f"sample {record.name}: is not what it was when it was indexed; index it again")
        return record, found

    def rows(self, record: Record, media: Sequence[Media]) -> np.ndarray:
        """Patch rows float32 `[n, P]` of all images and videos of a sample. Raises BadSample for one that fails."""
        reader = self.encoder.reader
        try:
            return np.concatenate([reader.rows(f, m) for f, m in zip(record.files, media, strict=True)])
        except BadSample as error:
            raise BadSample(error.kind, f"sample {record.name}: {error}") from error


def open_part(
    section: SourceSection,
    options: DataSection,
    family: Family,
    config: Any,
    tokenizer: Any,
    device: torch.device | str = "cpu",
) -> DataPart:
    """Opens a source. device: of this rank, where images may be decoded. Raises UserError when it cannot be read."""
    store_options = StoreOptions(**options.store.model_dump())
    root = section.root or _folder(section.path)
    store = Store(root, store_options)
    source = open_source(section.path, section.format, store, section.options)
    own = options.model_copy(update={key: value for key, value in section.media().items() if value is not None})
    chat = family.chats[section.chat or options.chat or next(iter(family.chats))](config, tokenizer)
    cached = options.decode_cache
    reader = MediaReader(
        family.media(config, own),
        store,
        config.vision.patch,
        own.min_frames,
        own.max_image_pixels,
        pick_decoder(options.decoder, device),
        DecodeCache(cached.dir, cached.bytes) if cached else None,
    )
    return DataPart(section, source, Encoder(family, config, chat, reader))


def _folder(path: str) -> str:
    """The folder of a source's file: relative paths are taken from it, and none may lead out of it."""
    if is_remote(path):
        return path.rsplit("/", 1)[0]
    return str(Path(path).absolute() if Path(path).is_dir() else Path(path).absolute().parent)


class Mixture:
    """All sources of a run.

    Raises UserError when one cannot be read, or none of its samples can be used.
    """

    def __init__(
        self,
        options: DataSection,
        family: Family,
        config: Any,
        tokenizer: Any,
        index_dir: Path,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        self.parts = [open_part(s, options, family, config, tokenizer, device) for s in options.all_sources()]
        self.indexes = [
            open_index(part, options, family, config, options.index_dir or index_dir, progress) for part in self.parts
        ]

    def __len__(self) -> int:
        return sum(len(index) for index in self.indexes)

    def name_of(self, source: int, place: int) -> tuple[str, int]:
        """A sample's source by name, and its number in it."""
        return self.parts[source].section.name, int(self.indexes[source].columns["number"][place])

    def digests(self) -> tuple[str, ...]:
        """Of each index, what its plan depends on (`Index.digest`): equal wherever the same samples are seen."""
        return tuple(index.digest() for index in self.indexes)

    def left_out(self) -> list[Skip]:
        """The samples that the indexes leave out."""
        named = zip(self.parts, self.indexes, strict=True)
        return [Skip(bad.kind, p.section.name, bad.number, bad.reason) for p, index in named for bad in index.bad]

    def for_planner(self) -> list[SourceIndex]:
        """The sources as the planner takes them."""
        return [
            SourceIndex(
                part.section.name,
                index,
                part.section.weight,
                part.section.shuffled(self.options),
                index.columns["tokens"],
                _blocks(part, index),
            )
            for part, index in zip(self.parts, self.indexes, strict=True)
        ]


def _blocks(part: DataPart, index: Index) -> tuple[int, ...] | None:
    """Ends, in the index, of the runs that the source reads together; None unless its shuffle is `blocks`.

    Raises UserError when its format has no such runs.
    """
    if part.section.shuffle != "blocks":
        return None
    if not hasattr(part.source, "blocks"):
        raise UserError(
            f"data.sources: {part.section.name} has no blocks to shuffle (tar shards and Parquet have); set its "
            "shuffle to true or false"
        )
    ends = np.searchsorted(index.columns["number"], [block.stop for block in part.source.blocks()])
    return tuple(sorted({int(end) for end in ends if end}))


def index_key(part: DataPart, options: DataSection, family: Family, config: Any) -> str:
    """A fingerprint of all that an index depends on."""
    media = {name: getattr(options, name) for name in MEDIA_OPTIONS}
    return fingerprint(
        part.source.stamp(),
        part.section.model_dump(mode="json", exclude={"weight", "shuffle", "name"}),
        [family.name, dataclasses.asdict(config)],
        [media, options.chat, options.max_tokens, options.overlong, options.max_image_pixels],
        *tokenizer_files(options.tokenizer),
    )


def index_file(folder: Path, name: str, mark: str) -> Path:
    """Where the index of a source with that fingerprint is kept: in the folder, whatever the source is called."""
    return folder / f"{index_stem(name)}-{mark[:16]}.parquet"


def index_stem(name: str) -> str:
    """How the files of a source's indexes begin."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def open_index(
    part: DataPart, options: DataSection, family: Family, config: Any, folder: Path, progress: Progress | None
) -> Index:
    """The index of a source: from its file when there is one that still holds, otherwise made and written there.

    Of several processes that ask at once, one makes it and the others wait.
    """
    mark = index_key(part, options, family, config)
    path = index_file(folder, part.section.name, mark)
    found = load_index(path, mark)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        found = load_index(path, mark)
        if found is None:
            damage = [Bad(-1 - i, error.kind, str(error)) for i, error in enumerate(getattr(part.source, "damage", []))]
            chunks = itertools.chain([([], damage)], _chunks(part, options, family, config))
            made = build_index(chunks, mark, _counter(part, progress))
            made.save(path)
            found = made
    return found


def _counter(part: DataPart, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(part.section.name, done, len(part.source))

    return count


def _chunks(part: DataPart, options: DataSection, family: Family, config: Any) -> Iterator[tuple[list[Any], list[Bad]]]:
    """What `index_rows` gives for the records, chunk by chunk in order."""
    spans = [range(a, min(a + CHUNK, len(part.source))) for a in range(0, len(part.source), CHUNK)]
    workers = min(options.index_workers or os.cpu_count() or 1, len(spans))
    if workers < 2 or len(part.source) <= FEW:
        for span in spans:
            yield index_rows(part.source, part.encoder, span, options.max_tokens, options.overlong)
        return
    done = 0
    for attempt in (1, 2):
        made = (part.section, options, family.name, config)
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=made) as pool:
            try:
                for found in pool.map(_work, spans[done:]):
                    yield found
                    done += 1
                return
            except BrokenProcessPool as error:
                if attempt == 2:
                    first = spans[done]
                    raise UserError(
                        f"data: a worker that indexes {part.section.name} died twice, at samples {first.start} to "
                        f"{first.stop - 1} or soon after; look for a file that crashes its decoder"
                    ) from error


_part: DataPart | None = None
"""In a worker process: the source it indexes."""
_options: DataSection | None = None


def _start(section: SourceSection, options: DataSection, family: str, config: Any) -> None:
    global _part, _options
    _part = open_part(section, options, get_family(family), config, load_tokenizer(options.tokenizer))
    _options = options


def _work(numbers: Sequence[int]) -> tuple[list[Any], list[Bad]]:
    if _part is None or _options is None:
        raise RuntimeError("the worker was not started")
    return index_rows(_part.source, _part.encoder, numbers, _options.max_tokens, _options.overlong)
