"""LLaVA-OneVision's conversations: from messages to token ids and to which of them are supervised.

Qwen's ChatML with the system line of the original (llava/conversation.py, `qwen_1_5`). Images and videos that come
before the words of a message are each followed by a newline, as in the template of the published checkpoints
(transformers' convert_llava_onevision_weights_to_hf.py); the only image of a message goes to its front wherever it
stood, as there and in the original's preprocess_multimodal; one among several that comes after words stays where it
is, with nothing added, as in the original's interleaved data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.layers.chat import MEDIA_PARTS, TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.llava_onevision.config import SPECIAL_TOKENS, LlavaOneVisionConfig, token_id
from tetrascope.models.media import Media

DEFAULT_SYSTEM = "You are a helpful assistant."
PLACEHOLDERS = {kind: SPECIAL_TOKENS[f"{kind}_token_id"] for kind in MEDIA_PARTS}


class ChatML:
    """Supervised are the assistant's words and the end-of-turn token that closes them."""

    def __init__(self, config: LlavaOneVisionConfig, tokenizer: Any) -> None:
        self._text = _encoder(config, tokenizer)

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each placeholder becomes its number of tokens.

        Raises UserError for an unknown content part, a number of images that differs from `media`, or a conversation
        with nothing to learn from.
        """
        text, answers, _ = render(messages)
        return self._text.encode(text, answers, [one.tokens for one in media])


class OriginalChatML:
    """The supervision of the original's preprocess_qwen, for comparison with its checkpoints.

    An assistant turn is supervised with its header and the newline after it; so is every newline token, every
    `<|im_start|>` and every `<|im_end|>` anywhere, what system and user say included.
    """

    def __init__(self, config: LlavaOneVisionConfig, tokenizer: Any) -> None:
        self._text = _encoder(config, tokenizer)
        newline = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
        self._always = [*newline, token_id(tokenizer, "<|im_start|>"), token_id(tokenizer, "<|im_end|>")]

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`. Raises UserError as `ChatML.encode` does."""
        text, _, turns = render(messages)
        ids, supervised = self._text.encode(text, turns, [one.tokens for one in media])
        return ids, supervised | np.isin(ids, self._always)


class Plain:
    """Image and caption, nothing else: the first stage (llava/train/train.py, preprocess_plain).

    Supervised are the caption and the newline that ends it. What the user says beside the image is not used.
    """

    def __init__(self, config: LlavaOneVisionConfig, tokenizer: Any) -> None:
        self._text = _encoder(config, tokenizer)

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`.

        Raises UserError unless the messages are one of a user, with one image or video, and one of the assistant.
        """
        roles = [role_of(message) for message in messages]
        if roles != ["user", "assistant"]:
            raise UserError(f"the chat format plain needs a user and an assistant message, not {roles}")
        shown, words = ([_rendered(part) for part in parts_of(message)] for message in messages)
        images = [part for part in shown if part in PLACEHOLDERS.values()]
        if len(images) != 1 or any(part in PLACEHOLDERS.values() for part in words):
            raise UserError("the chat format plain needs one image or video, in the user's message")
        text = images[0] + "".join(words) + "\n"
        return self._text.encode(text, [(len(images[0]), len(text))], [one.tokens for one in media])


def _encoder(config: LlavaOneVisionConfig, tokenizer: Any) -> TextEncoder:
    """Raises UserError when the tokenizer has other ids for the placeholders than the configuration."""
    for kind, token in PLACEHOLDERS.items():
        expected, found = getattr(config, f"{kind}_token_id"), token_id(tokenizer, token)
        if found != expected:
            raise UserError(
                f"data.tokenizer: {token} has id {found}, model.config.{kind}_token_id is {expected}; make them equal"
            )
    return TextEncoder(tokenizer, (config.image_token_id, config.video_token_id))


Spans = list[tuple[int, int]]


def render(messages: Sequence[dict[str, Any]]) -> tuple[str, Spans, Spans]:
    """The conversation as text; the character ranges of the answers with their end token; those of whole turns of the
    assistant, header and closing newline included."""
    text, answers, turns = "", [], []
    roles = [role_of(message) for message in messages]
    if not roles or roles[0] != "system":
        text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for role, message in zip(roles, messages, strict=True):
        turn = len(text)
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += _content(parts_of(message)) + "<|im_end|>"
        end = len(text)
        text += "\n"
        if role == "assistant":
            answers.append((start, end))
            turns.append((turn, len(text)))
    return text, answers, turns


def _content(parts: Sequence[dict[str, Any]]) -> str:
    media = [part for part in parts if part["type"] in MEDIA_PARTS]
    if len(media) == 1:
        parts = [*media, *(part for part in parts if part is not media[0])]
    text = ""
    for i, part in enumerate(parts):
        leading = all(before["type"] in MEDIA_PARTS for before in parts[: i + 1])
        text += _rendered(part) + "\n" * leading
    return text


def _rendered(part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] in PLACEHOLDERS:
        return PLACEHOLDERS[part["type"]]
    raise unknown_part(part, "text, image, video")
