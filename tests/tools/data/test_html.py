"""The page is well-formed, holds all it shows, and takes nothing in a sample for markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tetrascope.engine.data.index import Bad
from tetrascope.tools.data.html import page
from tetrascope.tools.data.preview import Piece, Preview, Shown
from tetrascope.tools.data.statistics import Measure, Statistics
from tetrascope.tools.data.svg import svg

EVIL = '<script>alert("1")</script>\'&'
VOID = ("meta", "img", "line", "rect")


class Reader(HTMLParser):
    """Tags opened and not closed, all tags and attributes, and the text of elements by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"{tag} closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1][1] if self.open else "", data))


def measured(title: str = "Tokens per sample") -> Measure:
    return Measure(title, "tokens & more", "samples", np.array([1.0, 2.0, 2.0, 9.0]))


@pytest.fixture(scope="module")
def made() -> str:
    bad = (Bad(3, "missing file", f"{EVIL} does not exist"), *(Bad(n, "bad json", f"line {n}") for n in range(25)))
    counted = Statistics(EVIL, 4, 1234, 7, 4, 1, 1, bad, (measured(EVIL), measured()))
    picture = Image.new("RGB", (640, 320), (200, 30, 30))
    frames = tuple(Image.new("RGB", (64, 64), (10 * n, 0, 0)) for n in range(5))
    tokens = (
        Piece("image 256 tokens", (90,), False, visual=True),
        Piece(EVIL, (1, 2), False),
        Piece("learn\nthis\x1b", (3,), True),
    )
    shown = Preview(EVIL, EVIL, 300, 1, tokens, (Shown("image", (picture,)), Shown("video", frames)))
    gone = Preview("s", "number 4", 3, 1, failure=EVIL)
    return page(EVIL, [counted], [shown, gone])


def test_page_is_well_formed_and_needs_nothing_else(made: str) -> None:
    found = Reader(made)
    assert not found.open
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object"})
    links = [value for _, attributes in found.tags for name in ("src", "href") if (value := attributes.get(name))]
    assert links and all(value.startswith("data:image/jpeg;base64,") for value in links)
    assert "http" not in made and "url(" not in made and "@import" not in made


def test_text_of_samples_is_no_markup(made: str) -> None:
    assert "<script" not in made
    found = Reader(made)
    text = "".join(data for _, data in found.texts)
    assert text.count(EVIL) >= 8  # titles, source and sample names, reason, failure, tokens
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "\x1b" not in made


def test_tokens_are_coloured_and_carry_their_ids(made: str) -> None:
    found = Reader(made)
    spans = [(a.get("class"), a.get("title")) for tag, a in found.tags if tag == "span" and a.get("title")]
    assert spans == [("visual", "90"), ("other", "1 2"), ("learned", "3")]
    assert ("visual", "image 256 tokens") in found.texts and ("learned", "learn\nthis␛") in found.texts


def test_left_out_samples_are_counted_by_kind_and_cut_short(made: str) -> None:
    text = "".join(data for _, data in Reader(made).texts)
    assert "bad json, 25" in text and "missing file, 1" in text
    assert "line 19" in text and "line 20" not in text and "and 5 more" in text


def test_pictures_are_small_copies(made: str) -> None:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', made)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found]
    assert sizes == [(220, 110)] + [(64, 64)] * 5


def test_histogram_has_title_labels_units_and_bars_to_scale() -> None:
    root = ElementTree.fromstring(svg(measured()))
    texts = [(text.get("class"), text.text) for text in root.iter("text")]
    assert ("title", "Tokens per sample") in texts and ("axis", "tokens & more") in texts
    assert ("axis", "samples") in texts
    rects = list(root.iter("rect"))
    tall = np.array([float(rect.get("height", "nan")) for rect in rects])
    assert (tall / tall.max()).tolist() == [0.5, 1, 0, 0, 0, 0, 0, 0, 0.5]
    hover = [title.text for title in root.iter("title")]
    assert hover[1] == "2 tokens & more: 2 samples"
    for rect in rects:
        assert float(rect.get("y", "nan")) >= 0 and float(rect.get("x", "nan")) >= 0
        assert float(rect.get("x", "nan")) + float(rect.get("width", "nan")) <= float(root.get("width", "nan"))
