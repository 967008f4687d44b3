"""ChatML: from messages to token ids and to which of them are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrascope.models.layers.chat import TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig

DEFAULT_SYSTEM = "You are a helpful assistant."
PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


class ChatML:
    """Qwen2-VL's chat format.

    Supervised are the assistant's words and the end-of-turn token that closes them; not the role headers, not the
    newline after a turn, not what system and user say, not visual tokens with their start and end.
    """

    def __init__(self, config: Qwen2VLConfig, tokenizer: Any) -> None:
        # An image inside an assistant turn comes from the environment: its borders are nothing to learn either.
        borders = (config.vision_start_token_id, config.vision_end_token_id)
        self._text = TextEncoder(tokenizer, (config.image_token_id, config.video_token_id), borders)

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each placeholder becomes its number of tokens.

        Raises UserError for an unknown content part, a number of images that differs from `media`, or a conversation
        with nothing to learn from.
        """
        text, spans = render(messages)
        return self._text.encode(text, spans, [one.tokens for one in media])


def render(messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as ChatML text, and the character ranges that are supervised."""
    text, spans = "", []
    roles = [role_of(message) for message in messages]
    if not roles or roles[0] != "system":
        text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for role, message in zip(roles, messages, strict=True):
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += "".join(_part(part) for part in parts_of(message))
        text += "<|im_end|>"
        if role == "assistant":
            spans.append((start, len(text)))
        text += "\n"
    return text, spans


def _part(part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] in PLACEHOLDERS:
        return PLACEHOLDERS[part["type"]]
    raise unknown_part(part, "text, image, video")
