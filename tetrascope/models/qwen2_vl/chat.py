"""ChatML: from messages to token ids and to which of them are supervised."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig

DEFAULT_SYSTEM = "You are a helpful assistant."
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


class ChatML:
    """Qwen2-VL's chat format.

    Supervised are the assistant's words and the end-of-turn token that closes them; not the role headers, not the
    newline after a turn, not what system and user say, not visual tokens with their start and end.
    """

    def __init__(self, config: Qwen2VLConfig, tokenizer: Any) -> None:
        self.image_token_id = config.image_token_id
        # An image inside an assistant turn comes from the environment: its borders are nothing to learn either.
        self._visual = (
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )
        # The tokenizers library's own object: transformers' wrapper around it costs ten times the tokenization. A
        # copy, since a tokenizer may be saved with a truncation or padding of its own, which must not act here.
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, messages: Sequence[dict[str, Any]], visual_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each image placeholder becomes its number of tokens.

        The text is tokenized once, as a whole, and supervision follows from character offsets: tokenizing pieces on
        their own would give other tokens at the seams. Raises UserError for an unknown content part, a number of
        images that differs from `visual_tokens`, or a conversation with nothing to learn from.
        """
        text, spans = render(messages)
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
        pads = ids == self.image_token_id
        if int(pads.sum()) != len(visual_tokens):
            raise UserError(f"conversation has {int(pads.sum())} image places but {len(visual_tokens)} images")
        for token in self._visual:
            supervised &= ids != token
        if not supervised.any():
            raise UserError("conversation has no assistant text to learn from")
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[pads] = visual_tokens
        return np.repeat(ids, repeats), np.repeat(supervised, repeats)


def render(messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as ChatML text, and the character ranges that are supervised."""
    text, spans = "", []
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"message {message!r} must be an object with role and content")
    if not messages or messages[0].get("role") != "system":
        text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for message in messages:
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message role {role!r} must be system, user or assistant")
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += _content(message.get("content"))
        text += "<|im_end|>"
        if role == "assistant":
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"message content must be a string or a list of parts, not {type(content).__name__}")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image":
            pieces.append(PLACEHOLDER)
        else:
            raise UserError(f"message content part {part!r} must be {{type: text, text: …}} or {{type: image, …}}")
    return "".join(pieces)
