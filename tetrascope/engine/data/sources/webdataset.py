"""WebDataset shards: tar files whose members with the same key are a sample."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tetrascope.engine.data.sources.base import BadSample, Blob, Record
from tetrascope.engine.data.sources.conversation import record
from tetrascope.engine.data.sources.shards import expand, stamp
from tetrascope.engine.data.sources.tar import Contents, Member, read_contents
from tetrascope.engine.data.store import Store
from tetrascope.errors import UserError

KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""Key and suffix of a member: its name up to the first dot of the last path component, as webdataset divides it
(base_plus_ext in its tariterators.py)."""

META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset leaves out (skip_meta in its tariterators.py)."""

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "tif", "tiff")
VIDEOS = ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg")
NAMING = ("image", "images", "image_url", "video", "videos", "video_url")
"""Keys of a row and of its parts whose values name files."""

KINDS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(VIDEOS, "video"), "json": "json", "txt": "txt"}
"""What a member is, by the end of its name; others are left out."""


class WebDataset:
    """Samples by number, of one tar file, a folder of them, a glob or a brace range (`shard-{000000..000009}.tar`).

    A sample is `key.json` (a row with `messages` or `conversations`) or `key.txt` (a caption: what the assistant says
    to the images), with its media: those that the row names (by a member's full name, its last path component or its
    suffix), then all others in the order of the numbers in their names (`key.0.jpg`, `key.1.jpg`, ...).

    Only headers are read when it is opened; a sample costs a read of its byte ranges. Samples of a shard have
    consecutive numbers: `blocks` gives them, so that a planner can shuffle the shards, and samples within a few of
    them, and still read each shard from its beginning to its end.

    A tar file that is cut gives its whole samples; `damage` says where it was cut, once a file.
    threads: shards whose headers are read at once.
    Raises UserError for shards that cannot be read or are compressed, and when there is no sample in any.
    """

    def __init__(self, path: str, store: Store, threads: int = 8) -> None:
        self._store = store
        self._urls = expand(path, store, ".tar")
        with ThreadPoolExecutor(min(threads, len(self._urls))) as pool:
            self._shards = list(pool.map(lambda url: _Shard.of(read_contents(url, store)), self._urls))
        self._ends = np.cumsum([len(shard.starts) - 1 for shard in self._shards])
        self.damage: list[BadSample] = [shard.damage for shard in self._shards if shard.damage is not None]
        if not len(self):
            first = f"; {self.damage[0]}" if self.damage else ""
            raise UserError(f"data: {path} holds no samples{first}; expected key.json or key.txt with key.jpg, key.mp4")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def blocks(self) -> list[range]:
        """Samples of each shard that has any, in order, covering all samples."""
        starts = [0, *self._ends[:-1].tolist()]
        return [range(start, end) for start, end in zip(starts, self._ends.tolist(), strict=True) if end > start]

    def stamp(self) -> str:
        return stamp(self._urls, self._store)

    def record(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard, url = self._shards[place], self._urls[place]
        inner = number - int(self._ends[place]) + len(shard.starts) - 1
        members = shard.members(inner)
        try:
            return self._record(members, url)
        except BadSample as error:
            last = shard.damage is not None and inner == len(shard.starts) - 2
            # What is missing may be what was cut off behind it.
            kind = "truncated tar" if last and error.kind in ("bad json", "missing file") else error.kind
            raise BadSample(kind, f"{url}: {error}") from error

    def _record(self, members: list[Member], url: str) -> Record:
        key = str(_key(members[0].name))
        of_kind = {kind: [m for m in members if _kind(m.name) == kind] for kind in ("json", "txt", "image", "video")}
        media = {kind: sorted(of_kind[kind], key=_natural) for kind in ("image", "video")}
        row: Any = None
        if of_kind["json"]:
            try:
                row = json.loads(self._text(of_kind["json"][0], url))
            except (ValueError, RecursionError) as error:
                raise BadSample("bad json", f"{of_kind['json'][0].name}: not valid JSON ({error})") from error
        if of_kind["txt"] and not (isinstance(row, dict) and {"messages", "conversations"} & set(row)):
            row = _caption(self._text(of_kind["txt"][0], url), media, key)  # what JSON there is describes the image
        elif row is None:
            raise BadSample("missing file", f"{key}: there is neither {key}.json nor {key}.txt")
        names = [(_aliases(m), m) for m in members]
        known = {aliases[i]: m for i in (2, 1, 0) for aliases, m in names}  # the fuller name counts

        def resolve(name: str) -> Blob:
            if name not in known:  # not looked up on disk: a shard is a closed whole
                raise BadSample("missing file", f"{key}: names {name}, which is no member of the sample")
            return Blob(url, known[name].offset, known[name].size)

        if isinstance(row, dict):
            named = {known[name].name for name in _file_names(row) if name in known}
            for kind, found in media.items():
                if row.get(kind) is None and row.get(f"{kind}s") is None:
                    row[f"{kind}s"] = [m.name for m in found if m.name not in named]
        return record(row, key, resolve)

    def _text(self, member: Member, url: str) -> str:
        try:
            return self._store.read(Blob(url, member.offset, member.size)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("bad json", f"{member.name}: is not UTF-8 ({error}); save it as UTF-8") from error


@dataclass(frozen=True)
class _Shard:
    """The member table of a shard: a row a member, samples as runs of rows.

    offsets, sizes, name_ends: int64 `[members]`. names: all names, one behind the other. starts: first member of each
    sample and the number of members, int64 `[samples + 1]`.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    names: bytes
    name_ends: np.ndarray
    starts: np.ndarray
    damage: BadSample | None

    @classmethod
    def of(cls, contents: Contents) -> _Shard:
        """Members of use, grouped by key; without the group whose member was cut."""
        lost = None if contents.cut is None or _kind(contents.cut) is None else _key(contents.cut)
        kept = [m for m in contents.members if _kind(m.name) and not META.match(m.name) and _key(m.name) is not None]
        groups = [list(group) for _, group in groupby(kept, key=lambda m: _key(m.name))]
        if groups and lost is not None and _key(groups[-1][0].name) == lost:
            groups.pop()
        rows = [m for group in groups for m in group]
        names = [m.name.encode("utf-8", "surrogateescape") for m in rows]
        return cls(
            np.array([m.offset for m in rows], dtype=np.int64),
            np.array([m.size for m in rows], dtype=np.int64),
            b"".join(names),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            np.cumsum([0, *(len(group) for group in groups)], dtype=np.int64),
            contents.damage,
        )

    def members(self, sample: int) -> list[Member]:
        found = []
        for row in range(int(self.starts[sample]), int(self.starts[sample + 1])):
            start = int(self.name_ends[row - 1]) if row else 0
            name = self.names[start : int(self.name_ends[row])].decode("utf-8", "surrogateescape")
            found.append(Member(name, int(self.offsets[row]), int(self.sizes[row])))
        return found


def _key(name: str) -> str | None:
    found = KEY.fullmatch(name)
    return found[1] if found else None


def _kind(name: str) -> str | None:
    return KINDS.get(name.rpartition(".")[2].lower())


def _aliases(member: Member) -> tuple[str, str, str]:
    """The names by which a row may call a member."""
    last = member.name.rpartition("/")[2]
    return member.name, last, last.partition(".")[2]


def _natural(member: Member) -> list[tuple[int, str]]:
    """Sorts 2 before 10, and `jpg` before `0.jpg`."""
    suffix = member.name.rpartition("/")[2].partition(".")[2]
    return [(int(one), "") if one.isdigit() else (-1, one) for one in suffix.split(".")[:-1]]


def _caption(text: str, media: dict[str, list[Member]], key: str) -> dict[str, Any]:
    """A row that shows all media of a sample and has the text as the answer."""
    parts = [{"type": kind} for kind, found in media.items() for _ in found]
    if not parts:
        raise BadSample("missing file", f"{key}: {key}.txt has no image or video beside it")
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": text.strip()}]}


def _file_names(value: Any, names: bool = False) -> Iterator[str]:
    """The texts in a row that stand where a file is named. names: whether `value` stands there."""
    if isinstance(value, str) and names:
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _file_names(one, names or key in NAMING)
    elif isinstance(value, list):
        for one in value:
            yield from _file_names(one, names)
