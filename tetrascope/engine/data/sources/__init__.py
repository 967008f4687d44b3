"""Where samples come from: one file a format, and the table of formats."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tetrascope.errors import UserError

if TYPE_CHECKING:
    from tetrascope.engine.data.sources.base import Source
    from tetrascope.engine.data.store import Store

# The formats are imported when they are opened: each brings its own libraries, and the store needs sources.base.
__all__ = ["FORMATS", "Format", "open_source"]


@dataclass(frozen=True)
class Format:
    """A format of sources. what: one line for users. options: each with what it means; None: whatever there is goes to
    the user's class. open: from a path, a store and checked options."""

    what: str
    open: Callable[[str, Store, Mapping[str, Any]], Source]
    options: Mapping[str, str] | None


def _json_rows(path: str, store: Store, options: Mapping[str, Any]) -> Source:
    from tetrascope.engine.data.sources.json_rows import JsonRows

    return JsonRows(path, store)


def _parquet(path: str, store: Store, options: Mapping[str, Any]) -> Source:
    from tetrascope.engine.data.sources.parquet import ParquetRows

    return ParquetRows(path, store, **options)


def _webdataset(path: str, store: Store, options: Mapping[str, Any]) -> Source:
    from tetrascope.engine.data.sources.webdataset import WebDataset

    return WebDataset(path, store, **options)


def _megatron(path: str, store: Store, options: Mapping[str, Any]) -> Source:
    from tetrascope.engine.data.sources.megatron import MegatronTokens

    return MegatronTokens(path, store)


def _plugin(path: str, store: Store, options: Mapping[str, Any]) -> Source:
    from tetrascope.engine.data.sources.plugin import Plugin

    return Plugin(path, store, options)


FORMATS: dict[str, Format] = {
    "messages": Format("JSON Lines or a JSON list of {messages}, files by path or data: URL", _json_rows, {}),
    "llava": Format("JSON Lines or a JSON list of {conversations, image, video}, as LLaVA has them", _json_rows, {}),
    "parquet": Format(
        "Parquet files with a column messages or conversations",
        _parquet,
        {"cache_mb": "memory for row groups in every process, in MiB (256)"},
    ),
    "webdataset": Format(
        "tar shards of key.json or key.txt with key.jpg, key.mp4",
        _webdataset,
        {"threads": "shards whose headers are read at once (8)"},
    ),
    "megatron": Format("tokens in Megatron's .bin and .idx; path without the suffix", _megatron, {}),
    "python": Format("your own class, package.module:Class, made with the options", _plugin, None),
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
    if known is None:
        return FORMATS[name].open(path, store, options)
    for option, value in options.items():
        if option not in known:
            takes = f"takes {_all(known)}" if known else "takes no options"
            raise UserError(f"data: {path}: option {option!r} is not known{_near(option, known)}; {name} {takes}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"data: {path}: option {option} is {value!r}; expected a whole number: {known[option]}")
    return FORMATS[name].open(path, store, options)


def _detected(path: str, store: Store) -> str:
    from tetrascope.engine.data.sources.base import BadSample, Blob
    from tetrascope.engine.data.sources.megatron import MAGIC
    from tetrascope.engine.data.sources.shards import expand
    from tetrascope.engine.data.sources.tar import COMPRESSED
    from tetrascope.engine.data.store import is_remote

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
