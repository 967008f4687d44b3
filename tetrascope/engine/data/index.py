"""What the planner needs of every sample, in columns: built once from headers and text, kept as a Parquet file.

A row is a sample, or a part of an over-long one: its number in the source, the turns it covers, tokens, supervised
tokens and a reference to its images and videos, of which equal ones are kept once. The file's metadata hold a
fingerprint of everything the columns depend on and the samples that could not be used.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tetrascope.engine.data.encode import Encoded, Encoder, split
from tetrascope.engine.data.sources.base import BadSample, Source, plain
from tetrascope.engine.plan import SampleInfo
from tetrascope.errors import UserError
from tetrascope.models.media import Media

FORMAT = 2
FINGERPRINT, BAD = b"tetrascope.fingerprint", b"tetrascope.bad"
REMEDY = "raise the limit, lower data.max_pixels, set data.overlong to drop or split, or remove the sample"
COLUMNS = ("number", "first", "last", "tokens", "supervised")


@dataclass(frozen=True)
class Bad:
    """A sample that was left out, or (kind `split`) is there in parts. kind: one of BAD_KINDS, dropped or split.

    number: negative for damage to a file of the source that hides samples, which then have no numbers.
    """

    number: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Row:
    """An indexed sample: number in its source, turns [first, last) of it ((0, 0): all), and what the planner knows."""

    number: int
    first: int
    last: int
    info: SampleInfo


class Index(Sequence[SampleInfo]):
    """The samples of a source, as the planner sees them.

    columns: int64 `[rows]` each, by the names in COLUMNS. shown: which entry of `media` each row has, int64 `[rows]`.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        shown: np.ndarray,
        media: list[tuple[Media, ...]],
        bad: list[Bad],
        fingerprint: str,
    ) -> None:
        self.columns, self.shown, self.media, self.bad, self.fingerprint = columns, shown, media, bad, fingerprint

    def __len__(self) -> int:
        return len(self.shown)

    @overload
    def __getitem__(self, place: int) -> SampleInfo: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[SampleInfo]: ...
    def __getitem__(self, place: int | slice) -> SampleInfo | Sequence[SampleInfo]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        tokens, supervised = self.columns["tokens"][place], self.columns["supervised"][place]
        return SampleInfo(int(tokens), int(supervised), self.media[self.shown[place]])

    def row(self, place: int) -> Row:
        """An indexed sample."""
        number, first, last = (int(self.columns[name][place]) for name in COLUMNS[:3])
        return Row(number, first, last, self[place])

    def digest(self) -> str:
        """A hash of what a plan takes from the index: equal for equal plans, wherever the index was made."""
        found = hashlib.sha256()
        for column in (*(self.columns[name] for name in COLUMNS), self.shown):
            found.update(np.ascontiguousarray(column).data)
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the Parquet file, whole or not at all."""
        texts = [json.dumps([asdict(one) for one in several]) for several in self.media]
        shown = pa.DictionaryArray.from_arrays(pa.array(self.shown, pa.int32()), pa.array(texts, pa.string()))
        table = pa.table({**{name: self.columns[name] for name in COLUMNS}, "media": shown})
        bad = zlib.compress(json.dumps([asdict(one) for one in self.bad]).encode())
        table = table.replace_schema_metadata({FINGERPRINT: self.fingerprint, BAD: bad})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)


def load_index(path: Path, fingerprint: str) -> Index | None:
    """The index in a file; None when there is none, or it is of other content or settings, or damaged."""
    try:
        # By default no more than 100 MB of metadata are read: a million dropped samples take more.
        table = pq.read_table(path, read_dictionary=["media"], thrift_string_size_limit=2**31 - 1)
    except (OSError, pa.ArrowException):
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(FINGERPRINT, b"").decode() != fingerprint:
        return None
    shown = table["media"].combine_chunks()
    shown = shown.chunk(0) if isinstance(shown, pa.ChunkedArray) else shown
    media = [tuple(_media(one) for one in json.loads(text)) for text in shown.dictionary.to_pylist()]
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    bad = [Bad(**one) for one in json.loads(zlib.decompress(metadata[BAD]))]
    return Index(columns, shown.indices.to_numpy().astype(np.int64), media, bad, fingerprint)


def _media(raw: dict[str, Any]) -> Media:
    fields: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Media(**fields)


def fingerprint(*parts: Any) -> str:
    """A hash of everything an index depends on: JSON values, and the bytes of files given as Paths."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def index_rows(
    source: Source, encoder: Encoder, numbers: Iterable[int], max_tokens: int, overlong: str
) -> tuple[list[tuple[int, int, int, int, int, tuple[Media, ...]]], list[Bad]]:
    """Rows (COLUMNS and media) and bad samples of some records; what every worker does.

    overlong: an over-long sample is a bad one (`error`), left out (`drop`), or cut between exchanges (`split`).
    """
    rows: list[tuple[int, int, int, int, int, tuple[Media, ...]]] = []
    bad: list[Bad] = []
    for number in numbers:
        try:
            record = source.record(number)
            parts: list[tuple[int, int, Encoded]] = [(0, 0, encoder.encode(record))]
            length = len(parts[0][2].ids_T)
            if length > max_tokens:
                told = plain(f"sample {record.name}: {length} tokens, more than data.max_tokens={max_tokens}")
                parts = split(record, encoder, max_tokens) if overlong == "split" else []
                if parts:
                    kept = sum(len(found.ids_T) for _, _, found in parts)
                    bad.append(Bad(number, "split", f"{told}; split into {len(parts)} parts of {kept} tokens in all"))
                elif overlong == "error":
                    raise BadSample("too long", f"{told}; {REMEDY}")
                else:
                    bad.append(Bad(number, "dropped", told))
        except BadSample as error:
            bad.append(Bad(number, error.kind, str(error)))
            continue
        rows += [(number, a, b, len(found.ids_T), found.targets, found.media) for a, b, found in parts]
    return rows, bad


def build_index(
    chunks: Iterable[tuple[list[Any], list[Bad]]], mark: str, progress: Callable[[int], None] = lambda done: None
) -> Index:
    """An index from what `index_rows` gave for consecutive records.

    progress: called with the number of samples after each chunk. Raises UserError when nothing is left.
    """
    flat = array("q")  # numbers and equal media kept once, from the start: millions of rows as objects fill the memory
    bad: list[Bad] = []
    places: dict[tuple[Media, ...], int] = {}
    for of_chunk, left_out in chunks:
        for *numbers, media in of_chunk:
            flat.extend((*numbers, places.setdefault(media, len(places))))
        bad += left_out
        progress(len(of_chunk) + len(left_out))
    table = np.array(flat, dtype=np.int64).reshape(-1, len(COLUMNS) + 1)
    columns = {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(COLUMNS)}
    shown = np.ascontiguousarray(table[:, -1])
    if not len(table):
        first = f"; first: {bad[0].reason}" if bad else ""
        raise UserError(f"data: none of the {len(bad)} samples can be used{first}")
    return Index(columns, shown, list(places), bad, mark)
