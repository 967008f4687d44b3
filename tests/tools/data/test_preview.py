"""Pieces put together are the sample; visual tokens are one piece an image; nothing reaches the terminal unescaped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.tiny import write_tokenizer
from tetrascope.engine.data.encode import Encoded
from tetrascope.models.media import Media
from tetrascope.tools.data.preview import Piece, Preview, choose, in_terminal, pieces, printable


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer: Any, parts: list[tuple[list[int], bool]], media: tuple[Media, ...] = ()) -> Encoded:
    ids = np.array([number for part, _ in parts for number in part])
    supervised = np.array([learned for part, learned in parts for _ in part])
    return Encoded(ids, supervised, media)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Any) -> None:
    asked, answer = "Größe? 漢字\n", "42 µm 🙂"
    found = list(
        pieces(encoded(tokenizer, [(ids(tokenizer, asked), False), (ids(tokenizer, answer), True)]), tokenizer, ())
    )
    assert "".join(piece.text for piece in found) == asked + answer
    assert "".join(piece.text for piece in found if piece.supervised) == answer
    assert [len(piece.ids) for piece in found if piece.text in "ö漢🙂"] == [2, 3, 4]
    assert [number for piece in found for number in piece.ids] == ids(tokenizer, asked) + ids(tokenizer, answer)


def test_broken_characters_end_and_do_not_cross_into_supervised_text(tokenizer: Any) -> None:
    half = ids(tokenizer, "🙂")[:2]
    found = list(pieces(encoded(tokenizer, [(half, False), (ids(tokenizer, "ok"), True)]), tokenizer, ()))
    assert "".join(piece.text for piece in found if piece.supervised) == "ok"
    assert [number for piece in found for number in piece.ids] == half + ids(tokenizer, "ok")


def test_each_image_is_one_piece_even_beside_another(tokenizer: Any) -> None:
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    media = tuple(Media("image", (1, 2, 2 * n), (4 * n,), n, n) for n in (3, 2))
    parts = [(ids(tokenizer, "a"), False), ([pad] * 5, False), (ids(tokenizer, "b"), True)]
    found = list(pieces(encoded(tokenizer, parts, media), tokenizer, (pad,)))
    assert [(piece.text, piece.visual) for piece in found] == [
        ("a", False),
        ("image 3 tokens", True),
        ("image 2 tokens", True),
        ("b", False),
    ]
    assert found[1].ids == (pad,)


def test_a_video_cut_by_text_is_several_pieces(tokenizer: Any) -> None:
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    parts = [([pad] * 4, False), (ids(tokenizer, "2s"), False), ([pad] * 4, False)]
    media = (Media("video", (2, 4, 4), (16, 16), 8, 8),)
    found = list(pieces(encoded(tokenizer, parts, media), tokenizer, (pad,)))
    assert [piece.text for piece in found] == ["video 4 tokens", "2", "s", "video 4 tokens"]


def test_samples_are_taken_from_all_sources_alike() -> None:
    chosen = choose([100, 2, 50], 7, seed=0)
    assert [sum(number == source for source, _ in chosen) for number in range(3)] == [3, 2, 2]
    assert len(set(chosen)) == 7 and choose([100, 2, 50], 7, seed=0) == chosen
    assert choose([100, 2, 50], 7, seed=1) != chosen
    assert len(choose([3, 2], 100, seed=0)) == 5 and choose([3], 0, seed=0) == []


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc\td\ud83d\x7f") == "a␛[31mb\nc␉d\ufffd\ufffd"
    shown = Preview("s", "n\x1b[2J", 3, 1, (Piece("\x1b]0;title\x07", (1,), False), Piece("yes", (2,), True)))
    text = in_terminal(shown)
    assert "\x1b" not in text.plain and "yes" in text.plain
    learned = [span for span in text.spans if "green" in str(span.style)]
    assert [text.plain[span.start : span.end] for span in learned] == ["yes"]
