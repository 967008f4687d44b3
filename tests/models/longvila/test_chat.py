"""LongVILA's conversations: which tokens they become, and which of them are learned from.

Golden, character by character: the tests' tokenizer has one token a byte, so text and supervision can be read. ChatML
is also compared with the chat template that VILA gives its Qwen2 tokenizers, rendered by transformers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.models.longvila.conftest import SPECIALS, make_tokenizer
from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import LongVilaConfig, clip, picture
from tetrascope.models.media import Media

SHAPES: dict[str, Any] = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 300},
    "vision": {"width": 32, "layers": 2, "heads": 2, "mlp": 64, "image": 14, "patch": 4},
}
IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
NEWLINE = 198
"""Of the tests' tokenizer, as of Qwen2's: bytes stand in the order of GPT-2's alphabet there."""

# VILA's qwen2.jinja says: a system line where there is none, then every message in its borders.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def config_of(tokenizer: Any, **changes: Any) -> LongVilaConfig:
    raw = FAMILY.complete({**SHAPES, **changes}, tokenizer)
    config: LongVilaConfig = validated(FAMILY.config_class, raw, "model.config")
    return config


def encode(
    tokenizer: Any, messages: list[Any], media: list[Media], name: str = "chatml", **changes: Any
) -> tuple[np.ndarray, np.ndarray]:
    config = config_of(tokenizer, **changes)
    ids, supervised = FAMILY.chats[name](config, tokenizer).encode(messages, media)
    assert ids.dtype == np.int64 and supervised.dtype == bool and ids.shape == supervised.shape
    assert ids.max() < config.decoder.vocab
    return ids, supervised


def marked(tokenizer: Any, messages: list[Any], media: list[Media], name: str = "chatml", **changes: Any) -> str:
    """The text of a conversation with supervised runs in [[ ]], and n visual tokens as (n)."""
    config = config_of(tokenizer, **changes)
    ids, supervised = encode(tokenizer, messages, media, name, **changes)
    visual = ids == config.image_token_id
    kinds = 2 * visual + supervised
    found = ""
    for start, stop in pairwise([0, *np.flatnonzero(np.diff(kinds)) + 1, len(ids)]):
        assert not (visual[start] and supervised[start])
        words = tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
        found += f"({stop - start})" if visual[start] else f"[[{words}]]" if supervised[start] else words
    return found


SHOWN = picture(config_of(make_tokenizer(SPECIALS)), (14, 14))
FILM = clip(config_of(make_tokenizer(SPECIALS)), (0, 3, 6))


def test_a_conversation(tokenizer: Any) -> None:
    messages = [
        said("user", IMAGE, text("What?")),
        said("assistant", text("A cat.")),
        said("user", text("And "), VIDEO, text("?")),
        said("assistant", text("Two\ncats.")),
    ]
    assert marked(tokenizer, messages, [SHOWN, FILM]) == (
        SYSTEM
        + "<|im_start|>user\n(4)\nWhat?<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]\n"
        + "<|im_start|>user\nAnd (4)\n(4)\n(4)\n?<|im_end|>\n<|im_start|>assistant\n[[Two\ncats.<|im_end|>]]\n"
    )


def test_a_system_message_of_its_own_and_an_image_the_assistant_shows(tokenizer: Any) -> None:
    messages = [said("system", text("Be brief.")), said("assistant", text("See "), IMAGE, text("there"))]
    assert marked(tokenizer, messages, [SHOWN]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n[[See ]](4)\n[[there<|im_end|>]]\n"
    )


@pytest.mark.parametrize("first", ["user", "system"])
def test_text_is_what_vilas_template_gives(tokenizer: Any, first: str) -> None:
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": first, "content": "one\n\ntwo"},
        {"role": "assistant", "content": " three "},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
    ]
    ids, _ = encode(tokenizer, messages, [])
    assert tokenizer.decode(ids.tolist()) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_newline_after_an_image_is_a_token_of_its_own() -> None:
    # VILA puts the newline's embedding after the features: it never merges with a newline that the text begins with.
    tokenizer = make_tokenizer(SPECIALS)
    tokenizer.add_tokens(["\n\n"])
    messages = [said("user", IMAGE, text("\nWhat?")), said("assistant", text("A\n\ncat"))]
    ids, _ = encode(tokenizer, messages, [SHOWN])
    merged = tokenizer.convert_tokens_to_ids("\n\n")
    last = int(np.flatnonzero(ids == config_of(tokenizer).image_token_id)[-1])
    assert ids[last + 1 : last + 3].tolist() == [NEWLINE, NEWLINE] and np.count_nonzero(ids == merged) == 1


def test_plain_is_image_and_caption(tokenizer: Any) -> None:
    messages = [said("user", text("Describe it."), IMAGE), said("assistant", text("A cat."))]
    assert marked(tokenizer, messages, [SHOWN], "plain") == "(4)\n[[A cat.\n]]"
    assert marked(tokenizer, [said("user", VIDEO), messages[1]], [FILM], "plain") == "(4)\n(4)\n(4)\n[[A cat.\n]]"
    for wrong in ([messages[1]], [said("user", text("Hi")), messages[1]], [said("user", IMAGE, IMAGE), messages[1]]):
        with pytest.raises(UserError, match="chat format plain needs one user turn with one image or video"):
            encode(tokenizer, wrong, [SHOWN], "plain")


def test_text_is_all_learned(tokenizer: Any) -> None:
    assert marked(tokenizer, [said("assistant", text("Once upon.\n"))], [], "text") == "[[Once upon.\n<|im_end|>]]"
    with pytest.raises(UserError, match="chat format text needs one assistant turn"):
        encode(tokenizer, [said("user", text("a")), said("assistant", text("b"))], [], "text")
    with pytest.raises(UserError, match="chat format text knows no images"):
        encode(tokenizer, [said("assistant", IMAGE, text("b"))], [SHOWN], "text")


ASKED = [said("user", IMAGE, text("What?")), said("assistant", text("A cat."))]


def test_the_image_token_of_a_tokenizer_that_has_none_is_the_next_id(tokenizer: Any) -> None:
    before = len(tokenizer)
    ids, _ = encode(tokenizer, ASKED, [SHOWN])
    assert config_of(tokenizer).image_token_id == before == 259
    assert np.count_nonzero(ids == before) == 4
    assert len(tokenizer) == before and "<image>" not in tokenizer.get_vocab(), "the tokenizer itself stays as it was"


def test_the_image_token_may_be_any_id_after_the_tokenizers(tokenizer: Any) -> None:
    ids, supervised = encode(tokenizer, ASKED, [SHOWN], image_token_id=299)
    assert np.count_nonzero(ids == 299) == 4 and not (ids == 259).any()
    again, the_same = encode(tokenizer, ASKED, [SHOWN])
    assert np.array_equal(np.where(ids == 299, 259, ids), again) and np.array_equal(supervised, the_same)


def test_the_image_token_of_a_tokenizer_that_has_it(tokenizer_with_image: Any) -> None:
    assert config_of(tokenizer_with_image).image_token_id == 259
    ids, _ = encode(tokenizer_with_image, ASKED, [SHOWN])
    assert np.count_nonzero(ids == 259) == 4
    with pytest.raises(UserError, match=r"<image> has id 259, model\.config\.image_token_id is 280; make them equal"):
        encode(tokenizer_with_image, ASKED, [SHOWN], image_token_id=280)


def test_an_existing_special_token_may_stand_for_images(tokenizer: Any) -> None:
    # As where the vocabulary has no room: the padding token, which no text contains.
    pad = tokenizer.pad_token_id
    ids, _ = encode(tokenizer, ASKED, [SHOWN], image_token_id=pad)
    assert np.count_nonzero(ids == pad) == 4


@pytest.mark.parametrize(("token", "named"), [("a", "'a'"), ("<|im_start|>", "<|im_start|>")])
def test_a_token_that_texts_contain_cannot_stand_for_images(tokenizer: Any, token: str, named: str) -> None:
    index = tokenizer.convert_tokens_to_ids(token)
    with pytest.raises(UserError, match=rf"image_token_id: {index} is .*which texts contain") as raised:
        encode(tokenizer, ASKED, [SHOWN], image_token_id=index)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("messages", "media", "message"),
    [
        ([said("user", text("Hi"))], [], "no assistant text to learn from"),
        (ASKED, [], "1 image places but 0 images"),
        ([said("user", text("<image> Hi")), ASKED[1]], [], "1 image places but 0 images"),
        ([said("user", {"type": "audio"}), ASKED[1]], [], "none of text, image, video"),
        ([said("tool", text("Hi")), ASKED[1]], [], "role 'tool'"),
    ],
)
def test_conversations_that_cannot_be_used(
    tokenizer: Any, messages: list[Any], media: list[Media], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode(tokenizer, messages, media)


def test_what_the_tokenizer_fills_in(tokenizer: Any) -> None:
    config = config_of(tokenizer)
    assert (config.eos_token_id, config.pad_token_id, config.decoder.vocab) == (256, 257, 300)
    shapes = {key: value for key, value in SHAPES["decoder"].items() if key != "vocab"}
    with pytest.raises(UserError, match=r"has no token <image>, and model\.config\.decoder\.vocab=259 has no room"):
        FAMILY.complete({**SHAPES, "decoder": shapes}, tokenizer)
    assert (
        FAMILY.complete({**SHAPES, "decoder": shapes}, make_tokenizer([*SPECIALS, "<image>"]))["decoder"]["vocab"]
        == 260
    )
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no eos_token"):
        FAMILY.complete(SHAPES, tokenizer)
