"""Conversation formats of LLaVA-1.5: from messages to token ids and to which of them are supervised.

Source: haotian-liu/LLaVA, `llava/conversation.py` (`vicuna_v1`, `llava_plain`) and `llava/train/train.py`
(`preprocess_multimodal`, `preprocess_v1`, `preprocess_plain`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.layers.chat import TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.llava.config import LlavaConfig
from tetrascope.models.media import Media

DEFAULT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Rendered = tuple[str, list[tuple[int, int]]]
"""A conversation as text, and the character ranges that are supervised."""


class _Format(ABC):
    """What both formats share: the tokenizer's own names of the special tokens.

    The image's token is whichever has the configuration's `image_token_id`. In checkpoints of the original repository,
    whose vocabulary has none for images, that is `<unk>`.
    """

    def __init__(self, config: LlavaConfig, tokenizer: Any) -> None:
        self._text = TextEncoder(tokenizer, (config.image_token_id,))
        self.bos = _token(tokenizer, "bos_token_id", config.bos_token_id)
        self.eos = _token(tokenizer, "eos_token_id", config.eos_token_id)
        self.image = _token(tokenizer, "image_token_id", config.image_token_id)

    @abstractmethod
    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError for a conversation that the format does not know."""

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each placeholder becomes its number of tokens.

        Raises UserError as `render` does, for a number of images that differs from `media`, and for a conversation
        with nothing to learn from.
        """
        text, spans = self.render(messages)
        return self._text.encode(text, spans, [one.tokens for one in media])


def _token(tokenizer: Any, field: str, index: int) -> str:
    token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    if token is None:
        raise UserError(f"data.tokenizer: has no token {index}, the model's {field}; use the model's own tokenizer")
    return str(token)


def _split(message: dict[str, Any]) -> tuple[int, str]:
    """How many images a message has, and its text. Only a user shows images."""
    images, text = 0, ""
    for part in parts_of(message):
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "image":
            images += 1
        else:
            raise unknown_part(part, "text, image")
    if images and message["role"] != "user":
        raise UserError(f"an image in a turn of the {message['role']}; LLaVA's formats show images in user turns only")
    return images, text


class Vicuna(_Format):
    """`vicuna_v1`: `{system} USER: {question} ASSISTANT: {answer}</s>USER: …`, the stage of instruction tuning.

    A turn's images come first, each as `<image>` and a newline, whatever their place in the message; its text then
    loses white space at both ends, as in the original. Supervised are the answers and the `</s>` after them, from the
    space before the answer on: a SentencePiece vocabulary holds it in the answer's first token.
    """

    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError for a system message that is not the first, and for images outside user turns."""
        roles = [role_of(message) for message in messages]
        if "system" in roles[1:]:
            raise UserError("a system message in mid-conversation; vicuna_v1 has one at most, the first")
        first = roles[:1] == ["system"]
        system = _split(messages[0])[1] if first else DEFAULT_SYSTEM
        text, spans = f"{self.bos}{system} ", []
        for role, message in list(zip(roles, messages, strict=True))[first:]:
            images, words = _split(message)
            if role == "user":
                if images:
                    words = (f"{self.image}\n" * images + words.strip()).strip()
                text += f"USER: {words} "
                continue
            text += "ASSISTANT:"
            start = len(text)
            text += f" {words}{self.eos}"
            spans.append((start, len(text)))
        return text, spans


class Plain(_Format):
    """`plain`: image, caption, newline, the stage of aligning the projector; all but the image is supervised.

    A sample is a user's turn with the image and the assistant's with the caption. What the user says besides, an
    instruction such as "Describe the image.", is not part of the format and is left out, as in the original.
    """

    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError unless a user's turn with an image and an assistant's turn are the whole conversation."""
        if [role_of(message) for message in messages] != ["user", "assistant"] or not _split(messages[0])[0]:
            raise UserError("chat format plain needs one user turn with an image, then one assistant turn, its caption")
        text = self.bos + self.image * _split(messages[0])[0]
        caption = f"{_split(messages[1])[1]}\n"
        return text + caption, [(len(text), len(text) + len(caption))]
