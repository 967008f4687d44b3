"""LongVILA's conversations: from messages to token ids and to which of them are supervised.

Source: NVlabs/VILA, `llava/model/language_model/chat_templates/qwen2.jinja` (ChatML, its system line without a full
stop), `llava/utils/tokenizer.py` (`preprocess_conversation`: supervised are the answers and the token that ends them),
`llava/model/encoders/{image,video}/basic.py` (the features of every picture and frame, then a newline),
`llava/data/dataset.py` (`preprocess_plain`) and `llava/train/train_llm_to_long.py` (texts, each with an end).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from tetrascope.errors import UserError
from tetrascope.models.layers.chat import MEDIA_PARTS, TextEncoder, parts_of, role_of, unknown_part
from tetrascope.models.longvila.config import IMAGE_TOKEN, LongVilaConfig
from tetrascope.models.media import Media

DEFAULT_SYSTEM = "You are a helpful assistant"

Rendered = tuple[str, list[tuple[int, int]]]
"""A conversation as text, and the character ranges that are supervised."""


class _Format(ABC):
    """What the formats share: a placeholder for each picture and video, and what it becomes.

    VILA has no token for visual ones; it writes −200 into the ids, or adds `<image>` to the tokenizer when it loads it.
    Here the placeholder is whichever token has the configuration's `image_token_id`; if that lies beyond the
    tokenizer's tokens, `<image>`, which is added to a copy of the tokenizer alone. Nothing of it is exported.
    """

    def __init__(self, config: LongVilaConfig, tokenizer: Any) -> None:
        self._config = config
        self.image, self._placeholder, tokenizer = _placeholder(config, tokenizer)
        self._text = TextEncoder(tokenizer, (self._placeholder,))
        newline = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
        if len(newline) != 1:
            raise UserError(f"data.tokenizer: a newline is {len(newline)} tokens, expected 1; use the model's own")
        self._newline = newline[0]

    @abstractmethod
    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError for a conversation that the format does not know."""

    def encode(self, messages: Sequence[dict[str, Any]], media: Sequence[Media]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 `[T]` and supervision bool `[T]`; a placeholder becomes the tokens of each frame, a newline
        token after each.

        Raises UserError as `render` does, for a number of images that differs from `media`, and for a conversation
        with nothing to learn from.
        """
        text, spans = self.render(messages)
        frame = self._config.side**2 + 1
        ids, supervised = self._text.encode(text, spans, [frame * len(one.frames) for one in media])
        rows = np.flatnonzero(ids == self._placeholder)
        ids[rows] = self._config.image_token_id
        ids[rows[frame - 1 :: frame]] = self._newline
        return ids, supervised


def _placeholder(config: LongVilaConfig, tokenizer: Any) -> tuple[str, int, Any]:
    """The placeholder in texts, its id, and a tokenizer that knows it."""
    index, own = config.image_token_id, tokenizer.get_vocab().get(IMAGE_TOKEN)
    if own is not None and own != index:
        raise UserError(
            f"data.tokenizer: {IMAGE_TOKEN} has id {own}, model.config.image_token_id is {index}; make them equal"
        )
    if index >= len(tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        return IMAGE_TOKEN, len(tokenizer) - 1, tokenizer
    token = tokenizer.convert_ids_to_tokens(index)
    if index not in tokenizer.added_tokens_decoder or token in ("<|im_start|>", "<|im_end|>"):
        raise UserError(
            f"model.config.image_token_id: {index} is {token!r} in the tokenizer, which texts contain; give the id "
            f"of a special token that they do not, or one after the tokenizer's {len(tokenizer)}"
        )
    return str(token), index, tokenizer


def _rendered(part: dict[str, Any], image: str) -> str:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] in MEDIA_PARTS:
        return image
    raise unknown_part(part, "text, image, video")


class ChatML(_Format):
    """Qwen2's chat format, in VILA's version. Supervised are the assistant's words and the `<|im_end|>` after them."""

    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError for an unknown role or content part."""
        text, spans = "", []
        roles = [role_of(message) for message in messages]
        if roles[:1] != ["system"]:
            text += f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        for role, message in zip(roles, messages, strict=True):
            text += f"<|im_start|>{role}\n"
            start = len(text)
            text += "".join(_rendered(part, self.image) for part in parts_of(message)) + "<|im_end|>"
            if role == "assistant":
                spans.append((start, len(text)))
            text += "\n"
        return text, spans


class Plain(_Format):
    """Image, caption, newline: the stage of aligning the projector. All but the image is supervised.

    What the user says beside the image is not part of the format and is left out, as in the original.
    """

    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError unless a user's turn with one image or video and an assistant's turn are all there is."""
        roles = [role_of(message) for message in messages]
        kinds = [[part["type"] for part in parts_of(message)] for message in messages]
        images = [sum(kind in MEDIA_PARTS for kind in of_message) for of_message in kinds]
        if roles != ["user", "assistant"] or images != [1, 0]:
            raise UserError(
                "chat format plain needs one user turn with one image or video, then one assistant turn, its caption"
            )
        caption = "".join(_rendered(part, self.image) for part in parts_of(messages[1])) + "\n"
        return self.image + caption, [(len(self.image), len(self.image) + len(caption))]


class Text(_Format):
    """A text without any conversation around it, and the tokenizer's end of text: the stage that lengthens the context.

    A sample is one turn of the assistant; every token of it is supervised.
    """

    def __init__(self, config: LongVilaConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._end = tokenizer.eos_token or ""

    def render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """Raises UserError unless one turn of the assistant, of text alone, is the whole sample."""
        if [role_of(message) for message in messages] != ["assistant"]:
            raise UserError("chat format text needs one assistant turn, the text to learn, and nothing else")
        parts = parts_of(messages[0])
        if any(part["type"] != "text" for part in parts):
            raise UserError("chat format text knows no images; use chatml, or remove them")
        text = "".join(part["text"] for part in parts) + self._end
        return text, [(0, len(text))]
