"""A sample as the model gets it: its pictures, and its tokens as text with runs of visual tokens shown as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from rich.text import Text

from tetrascope.engine.data.encode import Encoded
from tetrascope.engine.data.sources.base import BadSample
from tetrascope.models.media import Media
from tetrascope.tools.data.sources import Indexed

LONGEST_PIECE = 16
"""Tokens that are joined at most until they make whole characters."""

STRIP = 8
"""Frames of a video that are shown, at most."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens: the fewest that make whole characters, or those of an image or video (visual).

    ids: of the tokens, of a visual piece the one that is repeated.
    """

    text: str
    ids: tuple[int, ...]
    supervised: bool
    visual: bool = False


@dataclass(frozen=True)
class Shown:
    """An image, or frames of a video. pictures: decoded, in the original size."""

    label: str
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Preview:
    """A sample to look at. failure: why it cannot be shown any more, empty when it can."""

    source: str
    name: str
    tokens: int
    supervised: int
    pieces: tuple[Piece, ...] = ()
    media: tuple[Shown, ...] = ()
    failure: str = ""


def choose(lengths: Sequence[int], samples: int, seed: int) -> list[tuple[int, int]]:
    """(source, place) of some samples: drawn at random in each source, as many of one as of another if it has them."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(length)[:samples].tolist() for length in lengths]
    turns = [(place, number) for number, order in enumerate(orders) for place in range(len(order))]
    return sorted((number, orders[number][place]) for place, number in sorted(turns)[:samples])


def preview(source: Indexed, place: int, tokenizer: Any, visual_ids: Sequence[int], pictures: bool) -> Preview:
    """An indexed sample, read anew. pictures: whether to decode them."""
    try:
        record, found = source.part.sample(source.index, place)
        reader = source.part.encoder.reader
        reader.describe(record.files)  # whether they are still there
        media = [
            Shown(_media_label(one), tuple(_thin(reader.pictures(file, one))))
            for file, one in zip(record.files, found.media, strict=True)
            if pictures
        ]
    except BadSample as error:
        row = source.index.row(place)
        return Preview(source.name, f"number {row.number}", row.info.tokens, row.info.supervised, failure=str(error))
    made = tuple(pieces(found, tokenizer, visual_ids))
    return Preview(source.name, record.name, len(found.ids_T), found.targets, made, tuple(media))


def _thin(frames: list[Image.Image]) -> list[Image.Image]:
    if len(frames) <= STRIP:
        return frames
    return [frames[i] for i in np.linspace(0, len(frames) - 1, STRIP).round().astype(int)]


def _media_label(one: Media) -> str:
    size = f"{one.size[0]}x{one.size[1]} pixels"
    frames = f", {len(one.numbers)} frames taken" if one.kind == "video" and one.numbers else ""
    return f"{one.kind} {size}{frames}, {one.tokens} tokens"


def pieces(found: Encoded, tokenizer: Any, visual_ids: Sequence[int]) -> Iterator[Piece]:
    """The tokens of a sample in order."""
    ids, supervised = found.ids_T.tolist(), found.supervised_T.tolist()
    owners = [number for number, one in enumerate(found.media) for _ in range(one.tokens)]
    visual = set(visual_ids) if owners else set()
    start, seen = 0, 0
    before: list[int] = []
    while start < len(ids):
        stop = start + 1
        if ids[start] in visual and seen < len(owners):
            owner = owners[seen]
            seen += 1
            while stop < len(ids) and ids[stop] in visual and seen < len(owners) and owners[seen] == owner:
                stop, seen = stop + 1, seen + 1
            text = f"{found.media[owner].kind} {stop - start} tokens"
            yield Piece(text, (ids[start],), False, visual=True)
            before = []
        else:
            text = _text(tokenizer, before, ids[start:stop])
            while (
                text.endswith("\ufffd")
                and stop < min(len(ids), start + LONGEST_PIECE)
                and supervised[stop] == supervised[start]
                and ids[stop] not in visual
            ):
                stop += 1
                text = _text(tokenizer, before, ids[start:stop])
            before = ids[start:stop]
            yield Piece(text, tuple(before), supervised[start])
        start = stop


def _text(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """What tokens add to those before them: some tokenizers drop a space at the start of what they decode."""
    both = tokenizer.decode(before + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not before:
        return str(both)
    lead = tokenizer.decode(before, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(both[len(lead) :])


def printable(text: str) -> str:
    """Text without characters that a terminal would act on: they are shown as their symbols."""
    return "".join(c if c.isprintable() or c == "\n" else _symbol(c) for c in text)


def _symbol(character: str) -> str:
    return chr(0x2400 + ord(character)) if ord(character) < 32 else "\ufffd"


def in_terminal(shown: Preview, longest: int = 1500) -> Text:
    """A preview as coloured text: supervised text green, visual tokens as chips; at most so many pieces."""
    head = f"{shown.source}: {shown.name}, {shown.tokens} tokens, {shown.supervised} supervised\n"
    text = Text(printable(head), style="bold")
    if shown.failure:
        return text.append(printable(shown.failure), style="not bold red")
    for piece in shown.pieces[:longest]:
        style = "black on cyan" if piece.visual else "green" if piece.supervised else "dim"
        text.append(f" {piece.text} " if piece.visual else printable(piece.text), style=f"not bold {style}")
    if len(shown.pieces) > longest:
        text.append(f" … and {len(shown.pieces) - longest} more", style="not bold")
    return text
