"""Qwen3-VL's ChatML: from messages to token ids and to which of them are supervised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.layers.chat import MEDIA_PARTS, TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.media import Media
from tetrascope.models.qwen3_vl.config import Qwen3VLConfig

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_STEP = "<|vision_start|><|video_pad|><|vision_end|>"


class ChatML:
    """Qwen3-VL's chat format: no system message unless one is given, and a video as its temporal steps, each with the
    time it is seen at (`<0.5 seconds>`).

    Supervised are the assistant's words and the end-of-turn token that closes them; not the role headers, not the
    newline after a turn, not what system and user say, not visual tokens with their start, end and time.
    """

    def __init__(self, config: Qwen3VLConfig, tokenizer: Any) -> None:
        borders = (config.vision_start_token_id, config.vision_end_token_id)
        self._text = TextEncoder(tokenizer, (config.image_token_id, config.video_token_id), borders)

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each placeholder becomes its number of tokens.

        Raises UserError for an unknown content part, images and videos that are not those of `media`, or a
        conversation with nothing to learn from.
        """
        text, spans = render(messages, media)
        runs = [one.tokens // one.grid[0] for one in media for _ in range(one.grid[0])]
        return self._text.encode(text, spans, runs)


def render(messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as ChatML text, and the character ranges that are supervised."""
    text, spans = "", []
    shown = iter(media)
    for message in messages:
        role = role_of(message)
        text += f"<|im_start|>{role}\n"
        start = len(text)
        for part in parts_of(message):
            if part["type"] == "text":
                text += str(part["text"])
            elif part["type"] in MEDIA_PARTS:
                # An image or video inside an assistant turn comes from the environment: there is nothing to learn.
                if role == "assistant":
                    spans.append((start, len(text)))
                text += _placeholder(_next(shown, part["type"], len(media)))
                start = len(text)
            else:
                raise unknown_part(part, "text, image, video")
        text += "<|im_end|>"
        if role == "assistant":
            spans.append((start, len(text)))
        text += "\n"
    if left := len(list(shown)):
        raise UserError(f"conversation has {len(media) - left} image places but {len(media)} images")
    return text, spans


def _next(shown: Iterator[Media], kind: str, count: int) -> Media:
    one = next(shown, None)
    if one is None:
        raise UserError(f"conversation has more image places than its {count} images")
    if one.kind != kind:
        raise UserError(f"conversation has a place for a {kind} where its files have a {one.kind}; list them in order")
    return one


def _placeholder(one: Media) -> str:
    """The steps of a video in place of its start, pad and end token, as transformers 4.57 has it.

    The processor of transformers 5.23 gives the same steps (`processing_qwen3_vl.py`, `replace_video_token`) but puts
    them where the pad token was, so that the chat template's start and end token stay around the whole video.
    """
    if one.kind == "image":
        return IMAGE
    return "".join(f"<{time:.1f} seconds>{VIDEO_STEP}" for time in one.times)
