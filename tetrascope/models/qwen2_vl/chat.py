"""ChatML: from messages to token ids and to which of them are supervised.

Content parts: text, image, video; boxes and points (grounding.py); an agent's steps and actions (agent.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.layers.chat import TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl import agent
from tetrascope.models.qwen2_vl.grounding import LENGTHS, PLACEHOLDERS, TOKENS, Pictures

DEFAULT_SYSTEM = "You are a helpful assistant."
KNOWN = ("text", *PLACEHOLDERS, *LENGTHS, *agent.STEPS, "actions")


class VisualTokens(Protocol):
    """What of a configuration the format needs; Qwen2.5-VL has it too."""

    @property
    def image_token_id(self) -> int: ...
    @property
    def video_token_id(self) -> int: ...
    @property
    def vision_start_token_id(self) -> int: ...
    @property
    def vision_end_token_id(self) -> int: ...


class ChatML:
    """Qwen2-VL's chat format.

    Supervised are the assistant's words and the end-of-turn token that closes them; not the role headers, not the
    newline after a turn, not what system and user say, not what an agent's functions gave, not visual tokens with
    their start and end.
    """

    def __init__(self, config: VisualTokens, tokenizer: Any) -> None:
        # An image inside an assistant turn comes from the environment: its borders are nothing to learn either.
        borders = (config.vision_start_token_id, config.vision_end_token_id)
        self._text = TextEncoder(tokenizer, (config.image_token_id, config.video_token_id), borders)
        self._lacking = [token for token in TOKENS if tokenizer.backend_tokenizer.token_to_id(token) is None]

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; each placeholder becomes its number of tokens.

        Raises UserError for an unknown content part, a number of images that differs from `media`, a box outside its
        image, a tokenizer without the tokens that a box needs, or a conversation with nothing to learn from.
        """
        text, spans = render(messages, media)
        lacking = next((token for token in self._lacking if token in text), None)
        if lacking:
            raise UserError(f"data.tokenizer: has no token {lacking}, which boxes need; add it as a special token")
        return self._text.encode(text, spans, [one.tokens for one in media])


def render(messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as ChatML text, and the character ranges that are supervised.

    media: the images and videos of the messages, in order; their sizes scale boxes and points.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    pictures = Pictures(media)
    roles = [role_of(message) for message in messages]
    if not roles or roles[0] != "system":
        text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for role, message in zip(roles, messages, strict=True):
        text += f"<|im_start|>{role}\n"
        for piece, learned in [*_content(role, parts_of(message), pictures), ("<|im_end|>", True)]:
            if role == "assistant" and learned:
                if spans and spans[-1][1] == len(text):  # one range: a token may reach across parts
                    spans[-1] = (spans[-1][0], len(text) + len(piece))
                else:
                    spans.append((len(text), len(text) + len(piece)))
            text += piece
        text += "\n"
    return text, spans


def _content(role: str, parts: Sequence[dict[str, Any]], pictures: Pictures) -> agent.Pieces:
    """The parts of a message. An agent's steps and what follows a result begin on lines of their own."""
    pieces: agent.Pieces = []
    before = ""
    for part in parts:
        kind = part["type"]
        if kind in agent.STEPS and role != "assistant":
            raise UserError(
                f"message content part {part!r} stands in a message of the {role}; it belongs to the assistant"
            )
        if kind == "actions" and role != "system":
            raise UserError(
                f"message content part {part!r} stands in a message of the {role}; it belongs to the system"
            )
        written = "".join(piece for piece, _ in pieces)
        if "actions" in (kind, before) and written:
            pieces.append(("\n\n", True))
        elif (kind in agent.STEPS or before == "result") and written and not written.endswith("\n"):
            pieces.append(("\n", before != "result"))  # the line break after a result is the environment's too
        pieces += _pieces(part, pictures)
        before = kind
    return pieces


def _pieces(part: dict[str, Any], pictures: Pictures) -> agent.Pieces:
    kind = part["type"]
    if kind in agent.STEPS:
        return agent.step(part, pictures)
    if kind == "text":
        return [(str(part["text"]), True)]
    if kind in PLACEHOLDERS:
        return [(pictures.show(kind), True)]
    if kind in LENGTHS:
        return [(pictures.text(part), True)]
    if kind == "actions":
        return [(agent.actions(part), True)]
    raise unknown_part(part, ", ".join(KNOWN))
