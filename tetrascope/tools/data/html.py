"""What `tetrascope data inspect` found, as one HTML page that needs nothing else: no script, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from tetrascope.tools.data.preview import Piece, Preview, Shown, printable
from tetrascope.tools.data.statistics import Statistics
from tetrascope.tools.data.svg import svg

THUMBNAIL, FRAME = 220, 110
"""Longest side of an image and of a video's frame, in pixels."""

LONGEST = 4000
"""Pieces of a sample that are shown, at most."""

REASONS = 20
"""Samples that are named for each kind of what is left out, at most."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.charts { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 }
svg { border: 1px solid #ddd; border-radius: 6px; background: #fff } rect { fill: #3b76b5 } line { stroke: #555 }
svg text { font-size: 11px; text-anchor: middle; fill: #333 } svg .title { font-size: 14px; font-weight: 600 }
svg .left { text-anchor: end } svg .axis { font-size: 12px }
article { border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0 } h3 { margin: .2rem 0 }
.media { display: flex; flex-wrap: wrap; gap: .8rem; margin: .5rem 0 } .strip { display: flex; gap: 2px }
figcaption { font-size: 12px; color: #555 }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 13px }
.tokens span { border-radius: 2px } .tokens span:hover { outline: 1px solid #888 }
.learned { background: #c9efcf } .other { color: #555 } .bad { color: #a11 }
.visual { background: #2c5f8a; color: #fff; padding: 0 .5em; border-radius: 1em !important }
"""


def page(title: str, found: Sequence[Statistics], previews: Sequence[Preview]) -> str:
    """The page. found: statistics of all sources together first, when there are several, then of each."""
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{_safe(title)}</h1>",
        _table(found),
        *(_charts(one) for one in found),
        _left_out(found[1:] if len(found) > 1 else found),
        "<section><h2>Samples</h2><p>Every token has its id where the pointer rests on it. "
        '<span class="learned">Supervised</span>, <span class="other">not supervised</span>, '
        '<span class="visual">visual tokens</span>.</p>',
        *(_article(one) for one in previews),
        "</section></body></html>\n",
    ]
    return "\n".join(parts)


def _safe(text: str) -> str:
    return escape(printable(text))


def _table(found: Sequence[Statistics]) -> str:
    head = ("source", "samples", "left out", "tokens", "supervised", "visual", "images", "videos")
    rows = [
        (one.name, one.samples, len(one.bad), one.tokens, one.supervised, one.visual, one.images, one.videos)
        for one in found
    ]
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(
        "<tr>" + f"<td>{_safe(name)}</td>" + "".join(f"<td>{number:,}</td>" for number in numbers) + "</tr>"
        for name, *numbers in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _charts(one: Statistics) -> str:
    charts = "".join(f"<figure>{svg(measure)}</figure>" for measure in one.measures)
    return f'<section><h2>{_safe(one.name)}</h2><div class="charts">{charts}</div></section>'


def _left_out(found: Iterable[Statistics]) -> str:
    parts = []
    for one in found:
        for kind, count in one.bad_kinds.items():
            reasons = [bad.reason for bad in one.bad if bad.kind == kind]
            items = "".join(f"<li>{_safe(reason)}</li>" for reason in reasons[:REASONS])
            more = f"<li>and {count - REASONS:,} more</li>" if count > REASONS else ""
            parts.append(f'<h3 class="bad">{_safe(one.name)}: {_safe(kind)}, {count:,}</h3><ul>{items}{more}</ul>')
    return "<section><h2>Samples left out</h2>" + ("".join(parts) or "<p>None.</p>") + "</section>"


def _article(one: Preview) -> str:
    head = f"<h3>{_safe(one.source)}: {_safe(one.name)}</h3><p>{one.tokens:,} tokens, {one.supervised:,} supervised</p>"
    if one.failure:
        return f'<article>{head}<p class="bad">{_safe(one.failure)}</p></article>'
    media = f'<div class="media">{"".join(_media(shown) for shown in one.media)}</div>' if one.media else ""
    tokens = "".join(_piece(piece) for piece in one.pieces[:LONGEST])
    more = f" … and {len(one.pieces) - LONGEST:,} more" if len(one.pieces) > LONGEST else ""
    return f'<article>{head}{media}<div class="tokens">{tokens}{more}</div></article>'


def _piece(piece: Piece) -> str:
    kind = "visual" if piece.visual else "learned" if piece.supervised else "other"
    ids = " ".join(str(number) for number in piece.ids)
    return f'<span class="{kind}" title="{ids}">{_safe(piece.text)}</span>'


def _media(shown: Shown) -> str:
    side = THUMBNAIL if len(shown.pictures) == 1 else FRAME
    pictures = "".join(f'<img src="{_inline(one, side)}" alt="{_safe(shown.label)}">' for one in shown.pictures)
    return f'<figure><div class="strip">{pictures}</div><figcaption>{_safe(shown.label)}</figcaption></figure>'


def _inline(picture: Image.Image, side: int) -> str:
    """A small JPEG as a data: URL."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
