"""From a source's record to tokens and media: the same when data is indexed and when a step needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tetrascope.engine.data.reader import MediaReader
from tetrascope.engine.data.sources.base import BadSample, Record
from tetrascope.errors import UserError
from tetrascope.models.family import Chat, Family
from tetrascope.models.media import Media

MEDIA_KEYS = ("image", "video")


@dataclass(frozen=True)
class Encoded:
    """Token ids int64 `[T]`, supervision bool `[T]`, and the images and videos in order."""

    ids_T: np.ndarray
    supervised_T: np.ndarray
    media: tuple[Media, ...]

    @property
    def targets(self) -> int:
        """Supervised tokens that something precedes: a document's first token is predicted from nothing."""
        return int(self.supervised_T[1:].sum())


class Encoder:
    """Encodes the records of one source for one family."""

    def __init__(self, family: Family, config: Any, chat: Chat, reader: MediaReader) -> None:
        self._family, self._config, self._chat, self.reader = family, config, chat, reader

    def encode(self, record: Record, media: tuple[Media, ...] | None = None) -> Encoded:
        """Raises BadSample for a record that cannot be used. media: of its files, None to look at their headers."""
        if record.tokens is not None:
            return self._text(record.name, record.tokens)
        messages = record.messages or []
        try:
            media = self.reader.describe(record.files) if media is None else media
            ids, supervised = self._chat.encode(messages, media)
            self._family.positions(self._config, ids, media, (0, 0, 0))  # whether visual tokens and media agree
        except BadSample as error:
            raise BadSample(error.kind, f"sample {record.name}: {error}") from error
        except UserError as error:
            kind = "nothing to learn" if "to learn from" in str(error) else "bad json"
            raise BadSample(kind, f"sample {record.name}: {error}") from error
        found = Encoded(ids, supervised, media)
        if not found.targets:
            raise BadSample("nothing to learn", f"sample {record.name}: has no supervised token after its first")
        return found

    def _text(self, name: str, tokens: np.ndarray) -> Encoded:
        if len(tokens) < 2:
            raise BadSample("nothing to learn", f"sample {name}: has {len(tokens)} tokens, at least 2 are needed")
        ids = np.asarray(tokens, dtype=np.int64)
        vocab = self._config.decoder.vocab
        if ids.min() < 0 or ids.max() >= vocab:
            raise BadSample("other", f"sample {name}: has token {int(ids.max())}, the vocabulary {vocab}")
        _check_text(name, np.isin(ids, self._family.visual_ids(self._config)))
        return Encoded(ids, np.ones(len(ids), dtype=bool), ())


def _check_text(name: str, visual_T: np.ndarray) -> None:
    """Raises BadSample when tokens stand for an image, whole or cut: text that is tokenized already brings none, so
    that placeholders would be learned as words."""
    if not visual_T.any():
        return
    ends = np.flatnonzero(np.diff(visual_T, prepend=False, append=False)).tolist()
    start, stop = ends[0], ends[1]
    cut = [" that begins before the sample"] * (start == 0) + [" that goes on after it"] * (stop == len(visual_T))
    borders = [0, *ends, len(visual_T)]
    first, last = max(zip(borders[::2], borders[1::2], strict=True), key=lambda text: text[1] - text[0])
    raise BadSample(
        "other",
        f"sample {name}: tokens [{start}, {stop}) stand for an image or video{' and one'.join(cut)}, but tokenized "
        "text brings none; give the conversation with its images instead, or leave the image out: the longest text "
        f"in it is tokens [{first}, {last})",
    )


def part_of(record: Record, first: int, last: int) -> Record:
    """Turns [first, last) of a conversation with the files they stand for; tokens [first, last) of a text.

    A leading system message stays with every part. (0, 0) means the whole record.
    """
    if (first, last) == (0, 0):
        return record
    name = f"{record.name}[{first}:{last}]"
    if record.tokens is not None:
        return replace(record, name=name, tokens=record.tokens[first:last])
    messages = record.messages or []
    places = [files_of(message) for message in messages]
    before = sum(places[:first])
    kept = list(record.files[before : before + sum(places[first:last])])
    head = messages[:1] if first and messages and messages[0].get("role") == "system" else []
    kept = [*record.files[: places[0]], *kept] if head else kept
    return replace(record, name=name, messages=[*head, *messages[first:last]], files=tuple(kept))


def files_of(message: dict[str, Any]) -> int:
    """How many images and videos a message has places for: parts that name one, whatever their type."""
    content = message.get("content")
    return sum(_stands_for_file(part) for part in content) if isinstance(content, list) else 0


def _stands_for_file(part: Any) -> bool:
    return isinstance(part, dict) and any(key in part for key in MEDIA_KEYS)


def split(record: Record, encoder: Encoder, limit: int) -> list[tuple[int, int, Encoded]]:
    """Parts of an over-long record that have at most `limit` tokens, cut between exchanges, never inside a turn.

    An exchange ends with an assistant's turn. As many exchanges as fit make a part; one that does not fit alone is
    left out, which the caller sees from the gap. Text that is tokenized already is cut every `limit` tokens.
    """
    if record.tokens is not None:
        starts = range(0, len(record.tokens) - 1, limit)
        spans = [(start, min(start + limit, len(record.tokens))) for start in starts]
        return [(a, b, encoder.encode(part_of(record, a, b))) for a, b in spans if b - a > 1]
    parts: list[tuple[int, int, Encoded]] = []
    start: int | None = None
    for first, last in _exchanges(record.messages or []):
        grown = _fitting(record, encoder, limit, first if start is None else start, last)
        if grown is not None and start is not None and parts:
            parts[-1] = (start, last, grown)
            continue
        alone = _fitting(record, encoder, limit, first, last)
        start = first if alone is not None else None
        if alone is not None:
            parts.append((first, last, alone))
    return parts


def _fitting(record: Record, encoder: Encoder, limit: int, first: int, last: int) -> Encoded | None:
    try:
        found = encoder.encode(part_of(record, first, last))
    except BadSample:  # such as an exchange with nothing to learn
        return None
    return found if len(found.ids_T) <= limit else None


def _exchanges(messages: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Ranges of turns, each ending with an assistant's; a leading system message belongs to none."""
    found: list[tuple[int, int]] = []
    first = 1 if messages and messages[0].get("role") == "system" else 0
    for place, message in enumerate(messages):
        if message.get("role") == "assistant":
            found.append((first, place + 1))
            first = place + 1
    return found
