"""What all chat formats share: content parts, tokenization of a whole conversation, supervision by offsets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrascope.errors import UserError

ROLES = ("system", "user", "assistant")
MEDIA_PARTS = ("image", "video")
"""Types of content parts that stand for a file."""


class TextEncoder:
    """Text to tokens, with each visual placeholder repeated as often as its image has tokens.

    placeholders: token ids that stand for visual tokens. unsupervised: further token ids that are never learned.
    """

    def __init__(self, tokenizer: Any, placeholders: Sequence[int], unsupervised: Sequence[int] = ()) -> None:
        self._placeholders, self._unsupervised = tuple(placeholders), (*placeholders, *unsupervised)
        # The tokenizers library's own object: transformers' wrapper around it costs ten times the tokenization. A
        # copy, since a tokenizer may be saved with a truncation or padding of its own, which must not act here.
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, spans: Sequence[tuple[int, int]], runs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`.

        spans: supervised character ranges. runs: number of tokens that each placeholder becomes, in order.
        The text is tokenized once, as a whole, and supervision follows from character offsets: tokenizing pieces on
        their own would give other tokens at the seams. Raises UserError for text that is not Unicode, a number of
        placeholders that differs from `runs`, or nothing to learn from.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a JSON escape such as \ud83d without its other half
            raise UserError(f"conversation is not Unicode text ({error.reason}); remove the sample") from error
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        starts, ends = np.asarray(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            supervised |= (starts >= begin) & (ends <= end) & (ends > starts)
        pads = np.isin(ids, self._placeholders)
        if int(pads.sum()) != len(runs):
            raise UserError(f"conversation has {int(pads.sum())} image places but {len(runs)} images")
        supervised &= ~np.isin(ids, self._unsupervised)
        if not supervised.any():
            raise UserError("conversation has no assistant text to learn from")
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[pads] = runs
        return np.repeat(ids, repeats), np.repeat(supervised, repeats)


def role_of(message: object) -> str:
    """The role of a message. Raises UserError when it is none that chat formats know."""
    if not isinstance(message, dict):
        raise UserError(f"message {message!r} must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"message role {role!r} must be system, user or assistant")
    return str(role)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as a list of parts, each with a known or family-defined `type`.

    Raises UserError when it is neither a string nor a list of objects with a type.
    """
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UserError(f"message content must be a string or a list of parts, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise UserError(f"message content part {part!r} must be an object with a type, such as text or image")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise UserError(f"message content part {part!r} must be {{type: text, text: …}}")
    return content


def unknown_part(part: dict[str, Any], known: str) -> UserError:
    """The error for a part whose type the format does not know."""
    return UserError(f"message content part {part!r} has a type that is none of {known}")
