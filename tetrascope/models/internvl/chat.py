"""InternVL's chat formats: from messages to token ids and to which of them are supervised.

Both are ChatML; `internvl2_5` has a newline after each turn, `internlm2-chat` (and `Hermes-2`, the same text) has
none. Source of the formats and of their system messages: OpenGVLab/InternVL, `internvl/conversation.py`; of the
beginning-of-text token, the image's newline and `Frame1: `: `internvl/train/dataset.py`, and transformers'
`processing_internvl.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.internvl.config import TEMPLATES, InternVLConfig, token_id
from tetrascope.models.internvl.positions import runs
from tetrascope.models.layers.chat import MEDIA_PARTS, TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.media import Media

PICTURE = "<img><IMG_CONTEXT></img>"


@dataclass(frozen=True)
class Format:
    """What follows the end of a turn, and the system message of conversations that bring none."""

    after_turn: str
    system: str


FORMATS = {
    "internlm2-chat": Format(
        after_turn="",
        system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
    ),
    "internvl2_5": Format(
        after_turn="\n",
        system="你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    ),
}


class InternVLChat:
    """A chat format.

    Supervised are the assistant's words and the end-of-turn token that closes them; nothing of what system and user
    say, no role header, no visual token with its borders. A tokenizer that puts a token before every text
    (`add_bos_token`, InternLM2's) has it before the conversation. `model.config.system_message` replaces the format's
    system message; a conversation's own comes before both.
    """

    def __init__(self, name: str, config: InternVLConfig, tokenizer: Any) -> None:
        if token_id(tokenizer, "<IMG_CONTEXT>") != config.image_token_id:
            raise UserError(
                f"data.tokenizer: <IMG_CONTEXT> is token {token_id(tokenizer, '<IMG_CONTEXT>')}, the model's "
                f"image_token_id is {config.image_token_id}; use the tokenizer that belongs to the model"
            )
        self._config, self._format = config, FORMATS[name]
        self._system = self._format.system if config.system_message is None else config.system_message
        self._begin = tokenizer.bos_token or "" if getattr(tokenizer, "add_bos_token", False) else ""
        borders = (token_id(tokenizer, "<img>"), token_id(tokenizer, "</img>"))
        self._text = TextEncoder(tokenizer, (config.image_token_id,), borders)

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each placeholder becomes its number of tokens.

        Raises UserError for an unknown content part, images and videos that differ from `media`, or a conversation
        with nothing to learn from.
        """
        text, spans = render(messages, media, self._format.after_turn, self._system, self._begin)
        return self._text.encode(text, spans, runs(self._config, media))


def chat_of_template(config: InternVLConfig, tokenizer: Any) -> InternVLChat:
    """The format that the checkpoint names; where it names none, the one usual for its decoder."""
    return InternVLChat(TEMPLATES[config.chat_template], config, tokenizer)


CHATS = {
    "template": chat_of_template,
    "internlm2-chat": lambda config, tokenizer: InternVLChat("internlm2-chat", config, tokenizer),
    "internvl2_5": lambda config, tokenizer: InternVLChat("internvl2_5", config, tokenizer),
}


def render(
    messages: Sequence[dict[str, Any]], media: Sequence[Media], after_turn: str, system: str, begin: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character ranges that are supervised.

    system: message of a conversation that brings none, no turn when empty. begin: what every text begins with.
    """
    text = begin
    spans: list[tuple[int, int]] = []
    waiting = iter(media)
    roles = [role_of(message) for message in messages]
    if system and (not roles or roles[0] != "system"):
        text += f"<|im_start|>system\n{system}<|im_end|>{after_turn}"
    for role, message in zip(roles, messages, strict=True):
        text += f"<|im_start|>{role}\n"
        for part in [*parts_of(message), None]:
            words = "<|im_end|>" if part is None else _part(part, waiting)
            if role == "assistant" and (part is None or part["type"] == "text"):
                # One range for what is said without a picture between: a token may span the border of two parts.
                start = spans.pop()[0] if spans and spans[-1][1] == len(text) else len(text)
                spans.append((start, len(text) + len(words)))
            text += words
        text += after_turn
    return text, spans


def _part(part: dict[str, Any], waiting: Iterator[Media]) -> str:
    """A part as text. A picture has a newline after it, a video is a line for each frame."""
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] not in MEDIA_PARTS:
        raise unknown_part(part, "text, image, video")
    one = next(waiting, None)
    if one is None or one.kind != part["type"]:
        raise UserError(f"conversation has more or other parts than files: no {part['type']} belongs to {part!r}")
    if one.kind == "image":
        return f"{PICTURE}\n"
    return "".join(f"Frame{i}: {PICTURE}\n" for i in range(1, len(one.frames) + 1))
