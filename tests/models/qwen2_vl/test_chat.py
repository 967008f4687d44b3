"""ChatML: which tokens a conversation becomes, and which of them are learned from.

Golden token by token: what is supervised decides what a model learns, and no shape or loss tells that it is wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.chat import ChatML, render
from tetrascope.models.qwen2_vl.config import media

SHAPES = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 1, "heads": 2},
    "mrope_section": [2, 3, 3],
}
IMAGE = {"type": "image", "image": "a.png"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def seen(counts: list[int]) -> list[Media]:
    """Images of so many tokens."""
    return [media("image", (1, 2, 2 * count), 2) for count in counts]


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatML:
    return chat_of(tokenizer)


def chat_of(tokenizer: Any) -> ChatML:
    config = validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config")
    return ChatML(config, tokenizer)


def tokens(chat: ChatML, messages: list[dict[str, Any]], visual: list[int]) -> list[tuple[str, bool]]:
    """(token as text, supervised) of a conversation."""
    ids, supervised = chat.encode(messages, seen(visual))
    assert ids.dtype == np.int64 and supervised.dtype == bool and ids.shape == supervised.shape
    words = [chat._text._tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return [(word, bool(s)) for word, s in zip(words, supervised, strict=True)]


def marked(found: list[tuple[str, bool]]) -> str:
    """The tokens with | between them, supervised ones in upper case (`<|x|>` as `[x]`)."""
    plain = [(t.replace("<|", "[").replace("|>", "]"), s) for t, s in found]
    return "|".join(t.upper() if s else t for t, s in plain)


SYSTEM = "[im_start]|system|\n|You| are| a| helpful| assistant|.|[im_end]|\n|"


def test_two_turns_with_an_image(chat: ChatML) -> None:
    found = tokens(
        chat,
        [
            user(IMAGE, text("Count the digits.")),
            assistant(text("3")),
            user(text("How many digits are shown?")),
            assistant(text("3 1 4")),
        ],
        [4],
    )
    assert marked(found) == (
        SYSTEM
        + "[im_start]|user|\n|[vision_start]|[image_pad]|[image_pad]|[image_pad]|[image_pad]|[vision_end]|"
        + "Count| the| digits|.|[im_end]|\n|"
        + "[im_start]|assistant|\n|3|[IM_END]|\n|"
        + "[im_start]|user|\n|How| many| digits| are| shown|?|[im_end]|\n|"
        + "[im_start]|assistant|\n|3| |1| |4|[IM_END]|\n"
    )
    # Upper case cannot show digits and spaces, so once more by place: the two answers with the ends of their turns.
    assert [t for t, s in found if s] == ["3", "<|im_end|>", "3", " ", "1", " ", "4", "<|im_end|>"]
    assert [i for i, (_, s) in enumerate(found) if s] == [29, 30, 46, 47, 48, 49, 50, 51]


def test_a_system_message_of_its_own_replaces_the_default(chat: ChatML) -> None:
    system = {"role": "system", "content": "x"}
    found = tokens(chat, [system, {"role": "user", "content": "y"}, assistant(text("z"))], [])
    assert marked(found) == (
        "[im_start]|system|\n|x|[im_end]|\n|[im_start]|user|\n|y|[im_end]|\n|[im_start]|assistant|\n|Z|[IM_END]|\n"
    )


def test_images_expand_in_order(chat: ChatML) -> None:
    found = tokens(chat, [user(IMAGE, text("x"), IMAGE), assistant(text("y"))], [1, 3])
    assert marked(found).removeprefix(SYSTEM) == (
        "[im_start]|user|\n|[vision_start]|[image_pad]|[vision_end]|x|"
        "[vision_start]|[image_pad]|[image_pad]|[image_pad]|[vision_end]|[im_end]|\n|"
        "[im_start]|assistant|\n|Y|[IM_END]|\n"
    )


def test_images_inside_an_answer_are_not_learned(chat: ChatML) -> None:
    # A picture in an assistant turn is what a tool returned; its borders come with it.
    found = tokens(chat, [user(text("x")), assistant(text("y"), IMAGE, text("z"))], [2])
    assert marked(found).endswith("|Y|[vision_start]|[image_pad]|[image_pad]|[vision_end]|Z|[IM_END]|\n")


ANSWERS = ["héllo", "数字 3", "a😀b", "e\u0301", " leading", "trailing ", "\nnew\n\nlines\n", ""]


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_token_of_an_answer_is_supervised(chat: ChatML, answer: str) -> None:
    # Supervision comes from character offsets, which differ from bytes: the supervised tokens must be the answer.
    ids, supervised = chat.encode([user(text("q")), assistant(text(answer))], [])
    assert chat._text._tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False) == answer + "<|im_end|>"


def test_text_is_what_the_chat_template_gives(tokenizer: Any) -> None:
    # The template is the form in which users of the exported checkpoint will ask; training must not differ from it.
    conversations: list[list[dict[str, Any]]] = [
        [
            user(IMAGE, text("one ")),
            assistant(text(" two")),
            user(text("three"), IMAGE),
            assistant(text("four\n")),
        ],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\n\nb"},
            assistant(text("c")),
        ],
        [user(text("")), assistant(text(""))],
    ]
    for messages in conversations:
        assert render(messages, [])[0] == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("messages", "visual", "message"),
    [
        ([user(text("x"))], [], "no assistant text to learn from"),
        ([], [], "no assistant text to learn from"),
        ([user(IMAGE), assistant(text("x"))], [4, 4], "1 image places but 2 images"),
        ([user(IMAGE, IMAGE), assistant(text("x"))], [4], "2 image places but 1 images"),
        ([user(text("<|image_pad|>")), assistant(text("x"))], [], "1 image places but 0 images"),
        ([{"role": "tool", "content": "x"}], [], "role 'tool' must be system, user or assistant"),
        ([{"role": "user"}], [], "content must be a string or a list of parts, not NoneType"),
        ([user({"type": "audio"})], [], "part .*audio.* has a type that is none of"),
        ([user({"type": "text"})], [], "part .* must be"),
        ([user("words")], [], "part 'words' must be"),
        ([user(text("\ud83d")), assistant(text("x"))], [], "not Unicode text .surrogates not allowed"),
        (["hello"], [], "message 'hello' must be an object with role and content"),
    ],
)
def test_what_cannot_be_used_is_named(chat: ChatML, messages: list[Any], visual: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat.encode(messages, seen(visual))


def test_complete_takes_ids_and_vocabulary_from_the_tokenizer(tokenizer: Any) -> None:
    filled = FAMILY.complete(SHAPES, tokenizer)
    assert filled["decoder"]["vocab"] == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(filled["image_token_id"]) == "<|image_pad|>"
    assert tokenizer.convert_ids_to_tokens(filled["eos_token_id"]) == "<|im_end|>"
    given = FAMILY.complete({**SHAPES, "pad_token_id": 7, "decoder": {"vocab": 1000}}, tokenizer)
    assert given["pad_token_id"] == 7 and given["decoder"]["vocab"] == 1000
    assert "vocab" not in SHAPES["decoder"]  # the configuration it was given is left alone


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token <\|image_pad\|>"):
        FAMILY.complete(SHAPES, bare)


def test_a_tokenizer_saved_with_truncation_and_padding_cuts_nothing(tokenizer: Any) -> None:
    messages = [user(text("long " * 50)), assistant(text("end"))]
    whole, _ = chat_of(tokenizer).encode(messages, [])
    short = copy.deepcopy(tokenizer)
    short.backend_tokenizer.enable_truncation(16)
    short.backend_tokenizer.enable_padding(length=4096)
    found, _ = chat_of(short).encode(messages, [])
    assert np.array_equal(found, whole)
    assert short.backend_tokenizer.truncation is not None, "the tokenizer itself keeps its settings, for the export"
