"""LLaVA's conversation formats: which tokens a conversation becomes, and which of them are learned from.

Golden, worked out by hand from the original's `conversation.py` and `train.py`: what is supervised decides what a model
learns, and no shape or loss tells that it is wrong. The tokenizer (conftest.py) is Llama's in everything that matters
here: byte fallback, and a ▁ before every piece of text, which belongs to an answer's first token or is one of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.llava import FAMILY
from tetrascope.models.llava.chat import DEFAULT_SYSTEM, Plain, Vicuna
from tetrascope.models.llava.config import LlavaConfig
from tetrascope.models.media import Media

SHAPES: dict[str, Any] = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 2, "heads": 2, "mlp": 64, "image": 28},
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
    return [Media("image", (1, 1), (n + 1,), n + 1, n) for n in counts]


def config_of(tokenizer: Any) -> LlavaConfig:
    config: LlavaConfig = validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config")
    return config


@pytest.fixture(scope="module")
def vicuna(tokenizer: Any) -> Vicuna:
    return Vicuna(config_of(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> Plain:
    return Plain(config_of(tokenizer), tokenizer)


def tokens(tokenizer: Any, chat: Any, messages: list[dict[str, Any]], visual: list[int]) -> list[tuple[str, bool]]:
    """(token, supervised) of a conversation."""
    ids, supervised = chat.encode(messages, seen(visual))
    assert ids.dtype == np.int64 and supervised.dtype == bool and ids.shape == supervised.shape
    return list(zip(tokenizer.convert_ids_to_tokens(ids), supervised.tolist(), strict=True))


def test_the_first_format_is_vicuna() -> None:
    assert dict(FAMILY.chats) == {"vicuna_v1": Vicuna, "plain": Plain} and next(iter(FAMILY.chats)) == "vicuna_v1"


def test_golden_text_of_vicuna(vicuna: Vicuna) -> None:
    messages = [user(IMAGE, text("What is this?")), assistant(text("It.")), user(text("Why?")), assistant(text("So."))]
    rendered, spans = vicuna.render(messages)
    assert rendered == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is this? ASSISTANT: It.</s>USER: Why? ASSISTANT: So.</s>"
    )
    assert [rendered[start:stop] for start, stop in spans] == [" It.</s>", " So.</s>"]


def test_golden_tokens_of_vicuna(vicuna: Vicuna, tokenizer: Any) -> None:
    system = {"role": "system", "content": "x"}
    found = tokens(tokenizer, vicuna, [system, user(IMAGE, text("q")), assistant(text("a cat"))], [3])
    assert [token for token, _ in found] == [
        *("<s>", "▁", "x", "▁U", "S", "E", "R", ":", "▁", "<image>", "<image>", "<image>", "▁", "<0x0A>", "q"),
        *("▁", "A", "S", "S", "I", "S", "T", "A", "N", "T", ":", "▁a", "▁cat", "</s>"),
    ]
    assert [i for i, (_, learned) in enumerate(found) if learned] == [26, 27, 28]


def test_two_turns_of_vicuna(vicuna: Vicuna, tokenizer: Any) -> None:
    messages = [user(text("q")), assistant(text("a")), user(text("r")), assistant(text("cat"))]
    found = tokens(tokenizer, vicuna, messages, [])
    assert [token for token, learned in found if learned] == ["▁a", "</s>", "▁cat", "</s>"]
    assert found[0] == ("<s>", False)


@pytest.mark.parametrize("content", [(IMAGE, text("q")), (text("q"), IMAGE), (text("\n"), IMAGE, text(" q\n"))])
def test_images_come_first_in_their_turn(vicuna: Vicuna, content: tuple[dict[str, str], ...]) -> None:
    rendered, _ = vicuna.render([user(*content), assistant(text("a"))])
    assert rendered == f"<s>{DEFAULT_SYSTEM} USER: <image>\nq ASSISTANT: a</s>"


def test_several_images_and_images_alone(vicuna: Vicuna, tokenizer: Any) -> None:
    messages = [user(IMAGE, text("q"), IMAGE), assistant(text("a")), user(IMAGE), assistant(text("b"))]
    assert "USER: <image>\n<image>\nq ASSISTANT: a</s>USER: <image> ASSISTANT: b</s>" in vicuna.render(messages)[0]
    found = tokens(tokenizer, vicuna, messages, [1, 3, 2])
    assert [token for token, _ in found].count("<image>") == 6
    assert not any(learned for token, learned in found if token == "<image>")


ANSWERS = ["cat", "héllo", "数字 3", "a😀b", "e\u0301", " leading", "trailing ", "\nnew\n\nlines\n", "😀", ""]


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_token_of_an_answer_is_supervised(vicuna: Vicuna, tokenizer: Any, answer: str) -> None:
    # Supervision comes from character offsets, which differ from bytes: the supervised tokens must be the answer.
    ids, supervised = vicuna.encode([user(text("q")), assistant(text(answer))], [])
    assert tokenizer.backend_tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False).replace(
        " </s>", "</s>"
    ) == f" {answer}</s>".replace(" </s>", "</s>")


def test_golden_tokens_of_plain(plain: Plain, tokenizer: Any) -> None:
    # What the user says besides is no part of the format; everything after the image is learned, the newline too.
    found = tokens(tokenizer, plain, [user(text("Describe it."), IMAGE), assistant(text("a cat"))], [2])
    assert found == [
        ("<s>", False),
        ("<image>", False),
        ("<image>", False),
        ("▁a", True),
        ("▁cat", True),
        ("<0x0A>", True),
    ]


def test_the_token_of_images_may_be_any(tokenizer: Any) -> None:
    # Checkpoints of the original repository have no token for images: <unk>, which no text contains, stands for them.
    config = dataclasses.replace(config_of(tokenizer), image_token_id=0)
    ids, _ = Vicuna(config, tokenizer).encode([user(IMAGE, text("q")), assistant(text("数"))], seen([4]))
    assert (ids == 0).sum() == 4 and not (ids == tokenizer.convert_tokens_to_ids("<image>")).any()


@pytest.mark.parametrize(
    ("messages", "visual", "message"),
    [
        ([user(text("x"))], [], "no assistant text to learn from"),
        ([], [], "no assistant text to learn from"),
        ([user(IMAGE), assistant(text("x"))], [4, 4], "1 image places but 2 images"),
        ([user(text("<image>")), assistant(text("x"))], [], "1 image places but 0 images"),
        ([user(text("x")), assistant(text("y"), IMAGE)], [4], "an image in a turn of the assistant"),
        ([{"role": "system", "content": [IMAGE]}, assistant(text("y"))], [4], "an image in a turn of the system"),
        ([user(text("x")), {"role": "system", "content": "y"}], [], "system message in mid-conversation"),
        ([user({"type": "video"})], [4], "part .*video.* has a type that is none of text, image"),
        ([{"role": "tool", "content": "x"}], [], "role 'tool' must be system, user or assistant"),
    ],
)
def test_what_vicuna_cannot_use_is_named(vicuna: Vicuna, messages: list[Any], visual: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vicuna.encode(messages, seen(visual))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [user(text("q")), assistant(text("a"))],
        [assistant(text("a")), user(IMAGE)],
        [user(IMAGE), assistant(text("a")), user(text("q")), assistant(text("b"))],
        [{"role": "system", "content": "x"}, user(IMAGE), assistant(text("a"))],
    ],
)
def test_what_is_no_caption_is_refused(plain: Plain, messages: list[Any]) -> None:
    with pytest.raises(UserError, match="plain needs one user turn with an image, then one assistant turn"):
        plain.encode(messages, seen([4]))


def test_complete_takes_ids_and_vocabulary_from_the_tokenizer(tokenizer: Any) -> None:
    filled = FAMILY.complete(SHAPES, tokenizer)
    fields = ("image_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    assert [tokenizer.convert_ids_to_tokens(filled[f]) for f in fields] == ["<image>", "<s>", "</s>", "<pad>"]
    assert filled["decoder"]["vocab"] == len(tokenizer)
    given = FAMILY.complete({**SHAPES, "pad_token_id": 7, "decoder": {"vocab": 1000}}, tokenizer)
    assert given["pad_token_id"] == 7 and given["decoder"]["vocab"] == 1000
    assert "vocab" not in SHAPES["decoder"]  # the configuration it was given is left alone


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no <image>"):
        FAMILY.complete(SHAPES, bare)
    with pytest.raises(UserError, match=r"data\.tokenizer: has no bos_token"):
        FAMILY.complete({**SHAPES, "image_token_id": 0}, bare)
    config = dataclasses.replace(config_of(tokenizer), image_token_id=len(tokenizer))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token \d+, the model's image_token_id"):
        Vicuna(config, tokenizer)
