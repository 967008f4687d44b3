"""Where samples come from: one file a format, and the table of formats."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tetrascope.engine.data.sources.base import BadSample, Blob, Source
from tetrascope.engine.data.sources.json_rows import JsonRows
from tetrascope.engine.data.sources.megatron import MAGIC, MegatronTokens
from tetrascope.engine.data.sources.parquet import ParquetRows
from tetrascope.engine.data.sources.plugin import Plugin
from tetrascope.engine.data.sources.shards import expand
from tetrascope.engine.data.sources.tar import COMPRESSED
from tetrascope.engine.data.sources.webdataset import WebDataset
from tetrascope.engine.data.store import Store, is_remote
from tetrascope.errors import UserError

__all__ = ["FORMATS", "Format", "open_source"]


@dataclass(frozen=True)
class Format:
    """A format of sources. what: one line for users. options: each with what it means; None: whatever there is goes to
    the user's class. open: from a path, a store and checked options."""

    what: str
    open: Callable[[str, Store, Mapping[str, Any]], Source]
    options: Mapping[str, str] | None


FORMATS: dict[str, Format] = {
    "messages": Format(
        "JSON Lines or a JSON list of {messages}, files by path or data: URL",
        lambda path, store, options: JsonRows(path, store),
        {},
    ),
    "llava": Format(
        "JSON Lines or a JSON list of {conversations, image, video}, as LLaVA has them",
        lambda path, store, options: JsonRows(path, store),
        {},
    ),
    "parquet": Format(
        "Parquet files with a column messages or conversations",
        lambda path, store, options: ParquetRows(path, store, float(options.get("cache_mb", 256))),
        {"cache_mb": "memory for row groups in every process, in MiB (256)"},
    ),
    "webdataset": Format(
        "tar shards of key.json or key.txt with key.jpg, key.mp4",
        lambda path, store, options: WebDataset(path, store, int(options.get("threads", 8))),
        {"threads": "shards whose headers are read at once (8)"},
    ),
    "megatron": Format(
        "tokens in Megatron's .bin and .idx; path without the suffix",
        lambda path, store, options: MegatronTokens(path, store),
        {},
    ),
    "python": Format("your own class, package.module:Class, made with the options", Plugin, None),
}
SUFFIXES = {
    ".jsonl": "messages",
    ".ndjson": "messages",
    ".json": "messages",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",  # says there that it must be decompressed
    ".tgz": "webdataset",
    ".bin": "megatron",
    ".idx": "megatron",
}
CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def open_source(path: str, format: str, store: Store, options: Mapping[str, Any]) -> Source:
    """Opens a source. format: one of FORMATS, or `auto` for by its name or its first bytes.

    Raises UserError for a format or an option that there is not, and for a source that cannot be read.
    """
    name = _detected(path, store) if format == "auto" else format
    if name not in FORMATS:
        raise UserError(f"data: format {format!r} is not known{_near(format, FORMATS)}; formats: auto, {_all(FORMATS)}")
    known = FORMATS[name].options
    for option, value in options.items() if known is not None else ():
        if option not in known:
            takes = f"takes {_all(known)}" if known else "takes no options"
            raise UserError(f"data: {path}: option {option!r} is not known{_near(option, known)}; {name} {takes}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
            raise UserError(f"data: {path}: option {option} is {value!r}; expected {known[option]}, at least 1")
    return FORMATS[name].open(path, store, options)


def _detected(path: str, store: Store) -> str:
    if CLASS.fullmatch(path) and not os.path.exists(path):
        return "python"
    for suffix, name in SUFFIXES.items():
        if path.endswith(suffix):
            return name
    local = not is_remote(path)
    if local and os.path.isfile(f"{path}.idx"):
        return "megatron"
    if local and os.path.isdir(path):
        suffixes = {os.path.splitext(name)[1] for name in os.listdir(path)}
        found = [name for suffix, name in ((".parquet", "parquet"), (".tar", "webdataset")) if suffix in suffixes]
        if len(found) != 1:
            raise UserError(
                f"data: {path} holds {_all(suffixes) or 'nothing'}; give a file, or format: {_all(FORMATS)}"
            )
        return found[0]
    try:
        with store.open(Blob(expand(path, store, "")[0], 0, 512)) as file:
            head = file.read(512)
    except BadSample as error:
        raise UserError(f"data: {error}") from error
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(MAGIC):
        return "megatron"
    if head[257:262] == b"ustar" or head.startswith(tuple(COMPRESSED)):
        return "webdataset"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return "messages"
    raise UserError(f"data: {path}: its format is not clear from its name or first bytes; set format: {_all(FORMATS)}")


def _all(names: Any) -> str:
    return ", ".join(sorted(names))


def _near(name: str, names: Any) -> str:
    close = get_close_matches(str(name), list(names), 1)
    return f" (did you mean {close[0]}?)" if close else ""
