"""From the row forms that are about to the engine's messages and files."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tetrascope.engine.data.sources.base import BadSample, Blob, MediaFile, Record

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Speakers of LLaVA-style conversations, and ours."""

KINDS = ("image", "video")
Resolve = Callable[[str], "str | Blob"]
"""A path that a row names -> where it lies: a path or URL, or the bytes in an archive."""


def record(row: Any, fallback: str, resolve: Resolve) -> Record:
    """A row as a record: `messages` (ours, OpenAI's or Hugging Face's) or LLaVA's `conversations`.

    Files are named inside the content parts, or listed beside the messages in `image`, `images`, `video` or `videos`:
    paths, data: URLs, bytes, or Hugging Face's {bytes, path}. Raises BadSample for a row that is neither, and for a
    number of files that differs from the places for them.
    """
    if not isinstance(row, dict):
        raise BadSample("bad json", f"{fallback}: expected an object with messages or conversations")
    name = str(row["id"]) if row.get("id") is not None else fallback
    listed = {kind: _listed(row, kind) for kind in KINDS}
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif isinstance(row.get("conversations"), list):
        messages = [_llava_turn(turn, name) for turn in row["conversations"]]
    else:
        raise BadSample("bad json", f'{name}: expected an object with a list "messages" or "conversations"')
    files: list[MediaFile] = []
    done = [_message(message, name, listed, files, resolve) for message in messages]
    left = [f"{len(rest)} {kind}s" for kind, rest in listed.items() if rest]
    if left:
        raise BadSample("bad json", f"{name}: {' and '.join(left)} more than there are places for them")
    return Record(name, done, tuple(files))


def _listed(row: dict[str, Any], kind: str) -> list[Any]:
    """The row's files of a kind that stand beside its messages."""
    value: Any = next((row[key] for key in (kind, f"{kind}s") if row.get(key) is not None), [])
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _llava_turn(turn: Any, name: str) -> dict[str, Any]:
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(text, str):
        raise BadSample("bad json", f"{name}: turn {turn!r} must have from (human, gpt or system) and a text value")
    parts: list[dict[str, Any]] = []
    for piece in re.split(r"(<image>|<video>)", text):
        if piece in ("<image>", "<video>"):
            parts.append({"type": piece[1:-1]})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return {"role": ROLES[speaker], "content": _without_seams(parts)}


def _without_seams(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the line break that LLaVA-style rows put after a leading `<image>`: formats add their own."""
    for before, part in pairwise(parts):
        if before["type"] in KINDS and part["type"] == "text":
            part["text"] = part["text"].removeprefix("\n")
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _message(
    message: Any, name: str, listed: dict[str, list[Any]], files: list[MediaFile], resolve: Resolve
) -> dict[str, Any]:
    """A message in the engine's form; its files are appended to `files`.

    A part of another type than image or video that names a file keeps its type. The file's name is all that is left of
    it in the part: bytes are in `files`.
    """
    if not isinstance(message, dict):
        raise BadSample("bad json", f"{name}: message {message!r} must be an object with role and content")
    content = message.get("content")
    if not isinstance(content, list):
        return {"role": message.get("role"), "content": content}
    parts = []
    for part in content:
        kind = _kind(part)
        if kind is None:
            parts.append(part)
            continue
        part, value = dict(part), _value(part, kind)
        part["type"] = kind if part.get("type") in (None, f"{kind}_url") else part["type"]
        if value is None:
            if not listed[kind]:
                raise BadSample("bad json", f'{name}: "{kind}" is None; expected the path of a file')
            value = listed[kind].pop(0)
        files.append(_file(kind, value, part.get("fps", 1.0), name, resolve))
        kept = {key: held for key, held in part.items() if key != f"{kind}_url"}
        parts.append({**kept, kind: str(files[-1].blobs[0])})
    return {"role": message.get("role"), "content": parts}


def _kind(part: Any) -> str | None:
    """Whether a part stands for a file: by its type, or because it names one whatever its type."""
    if not isinstance(part, dict):
        return None
    for kind in KINDS:
        if part.get("type") in (kind, f"{kind}_url") or part.get(kind) is not None:
            return kind
    return None


def _value(part: dict[str, Any], kind: str) -> Any:
    value = part.get(kind, part.get(f"{kind}_url"))
    return value.get("url") if isinstance(value, dict) and "url" in value else value


def _file(kind: Any, value: Any, fps: Any, name: str, resolve: Resolve) -> MediaFile:
    several = value if kind == "video" and isinstance(value, (list, tuple)) else [value]
    if not several:
        raise BadSample("bad json", f'{name}: "{kind}" is {value!r}; expected the path of a file')
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not fps > 0:
        raise BadSample("bad json", f'{name}: "fps" is {fps!r}; expected how many of the pictures are shown a second')
    return MediaFile(kind, tuple(_blob(kind, one, name, resolve) for one in several), float(fps))


def _blob(kind: str, value: Any, name: str, resolve: Resolve) -> Blob:
    if isinstance(value, dict):  # Hugging Face's image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return Blob(f"{kind} in {name}", data=bytes(value))
    if not isinstance(value, str) or not value:
        raise BadSample("bad json", f'{name}: "{kind}" is {value!r}; expected the path of a file')
    if value.startswith("data:"):
        return Blob(f"{kind} in {name}", data=_data_url(value, name))
    found = resolve(value)
    return found if isinstance(found, Blob) else Blob(found)


def _data_url(value: str, name: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSample("bad json", f"{name}: a data: URL must be in base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("bad json", f"{name}: a data: URL is not base64 ({error})") from error
