"""LLaVA-OneVision's conversations: which tokens they become, and which of them are learned from.

Golden token by token, and equal to the chat template of the published checkpoints (from transformers' conversion
script). The original's own supervision is compared with its loop over turns, written out here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.llava_onevision import FAMILY
from tetrascope.models.llava_onevision.chat import render
from tetrascope.models.media import Media

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SHAPES: dict[str, Any] = {"decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2}}
IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}
SYSTEM = "[im_start]|system|\n|You| are| a| helpful| assistant|.|[im_end]|\n|"


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def system(words: str) -> dict[str, Any]:
    return {"role": "system", "content": [text(words)]}


def seen(counts: list[int]) -> list[Media]:
    """Images of so many tokens."""
    return [Media("image", (0, 0), (count,), count, count) for count in counts]


def chat_of(tokenizer: Any, name: str = "qwen") -> Any:
    config = validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config")
    return FAMILY.chats[name](config, tokenizer)


def marked(chat: Any, messages: list[dict[str, Any]], visual: list[int]) -> str:
    """The tokens with | between them, supervised ones in upper case (`<|x|>` as `[x]`, a supervised newline as N)."""
    ids, supervised = chat.encode(messages, seen(visual))
    assert ids.dtype == np.int64 and supervised.dtype == bool and ids.shape == supervised.shape
    words = [chat._text._tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    plain = [word.replace("<|", "[").replace("|>", "]") for word in words]
    return "|".join(w.upper().replace("\n", "N") if s else w for w, s in zip(plain, supervised, strict=True))


def test_the_first_format_is_the_default() -> None:
    assert list(FAMILY.chats) == ["qwen", "qwen_original", "plain"]


def test_two_turns_with_an_image(tokenizer: Any) -> None:
    messages = [
        user(IMAGE, text("What is shown?")),
        assistant(text("a cat")),
        user(text("red?")),
        assistant(text("yes")),
    ]
    assert marked(chat_of(tokenizer), messages, [3]) == (
        SYSTEM
        + "[im_start]|user|\n|<image>|<image>|<image>|\n|What| is| shown|?|[im_end]|\n|"
        + "[im_start]|assistant|\n|A| CAT|[IM_END]|\n|"
        + "[im_start]|user|\n|red|?|[im_end]|\n|"
        + "[im_start]|assistant|\n|YES|[IM_END]|\n"
    )


def test_the_originals_supervision(tokenizer: Any) -> None:
    messages = [user(IMAGE, text("What is shown?\nWhat?\n\nWhat?")), assistant(text("a cat"))]
    assert marked(chat_of(tokenizer, "qwen_original"), messages, [2]) == (
        "[IM_START]|system|N|You| are| a| helpful| assistant|.|[IM_END]|N|"
        + "[IM_START]|user|N|<image>|<image>|N|What| is| shown|?|N|What|?|\n\n|What|?|[IM_END]|N|"
        + "[IM_START]|ASSISTANT|N|A| CAT|[IM_END]|N"
    )


def test_the_originals_loop_over_turns_gives_the_same(tokenizer: Any) -> None:
    # preprocess_qwen of llava/train/train.py in its own steps: every turn tokenized by itself, then three ids unmasked.
    messages = [user(text("What\nis\n\nshown?")), assistant(text("a cat\n")), user(text("a")), assistant(text("\nyes"))]
    turns = [system("You are a helpful assistant."), *messages]
    expected_ids: list[int] = []
    expected: list[bool] = []
    for turn in turns:
        words = f"<|im_start|>{turn['role']}\n{turn['content'][0]['text']}<|im_end|>\n"
        ids = tokenizer.encode(words, add_special_tokens=False)
        expected_ids += ids
        expected += [turn["role"] == "assistant"] * len(ids)
    always = [tokenizer.encode(word, add_special_tokens=False) for word in ("\n", "<|im_start|>", "<|im_end|>")]
    assert [len(one) for one in always] == [1, 1, 1]
    unmasked = [here or [i] in always for here, i in zip(expected, expected_ids, strict=True)]
    ids, supervised = chat_of(tokenizer, "qwen_original").encode(messages, [])
    assert ids.tolist() == expected_ids and supervised.tolist() == unmasked


def test_image_and_caption(tokenizer: Any) -> None:
    messages = [user(text("Describe."), IMAGE), assistant(text("a red cat"))]
    assert marked(chat_of(tokenizer, "plain"), messages, [3]) == "<image>|<image>|<image>|A| RED| CAT|N"
    video = [user(VIDEO), assistant(text("a dog"))]
    assert marked(chat_of(tokenizer, "plain"), video, [2]) == "<video>|<video>|A| DOG|N"


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user(IMAGE, text("one ")), assistant(text(" two")), user(text("three"), IMAGE), assistant(text("four\n"))],
    [user(IMAGE, IMAGE, VIDEO, text("a"), text("b")), assistant(text("c"))],
    [user(text("x"), VIDEO, text("y")), assistant(text(""))],
    [user(text("")), assistant(text("z"))],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_text_is_what_the_chat_template_gives(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    whole = [system("Be brief."), *messages]
    assert render(whole)[0] == tokenizer.apply_chat_template(whole, chat_template=TEMPLATE, tokenize=False)
    # Without a system message the original says one of its own, and the template none.
    default = [system("You are a helpful assistant."), *messages]
    assert render(messages)[0] == tokenizer.apply_chat_template(default, chat_template=TEMPLATE, tokenize=False)


def test_images_between_words_stay_there(tokenizer: Any) -> None:
    messages = [user(text("What is "), IMAGE, text(" and "), IMAGE, text("?")), assistant(text("a"))]
    assert render(messages)[0].endswith(
        "<|im_start|>user\nWhat is <image> and <image>?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    ids, _ = chat_of(tokenizer).encode(messages, seen([2, 3]))
    image = tokenizer.convert_tokens_to_ids("<image>")
    runs = "".join("i" if i == image else "." for i in ids).split(".")
    assert [len(run) for run in runs if run] == [2, 3]


def test_images_inside_an_answer_are_not_learned(tokenizer: Any) -> None:
    messages = [user(text("a")), assistant(IMAGE, text("cat"))]
    for name in ("qwen", "qwen_original"):
        ids, supervised = chat_of(tokenizer, name).encode(messages, seen([2]))
        assert not supervised[ids == tokenizer.convert_tokens_to_ids("<image>")].any()


@pytest.mark.parametrize("answer", ["héllo", "数字 3", "a😀b", " leading", "trailing ", "new\n\nlines\n", ""])
def test_every_token_of_an_answer_is_supervised(tokenizer: Any, answer: str) -> None:
    chat = chat_of(tokenizer)
    ids, supervised = chat.encode([user(text("q")), assistant(text(answer))], [])
    assert chat._text._tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False) == answer + "<|im_end|>"


@pytest.mark.parametrize("name", ["qwen", "qwen_original"])
@pytest.mark.parametrize(
    ("messages", "visual", "message"),
    [
        ([user(text("x"))], [], "no assistant text to learn from"),
        ([user(IMAGE), assistant(text("x"))], [4, 4], "1 image places but 2 images"),
        ([user(text("<image>")), assistant(text("x"))], [], "1 image places but 0 images"),
        ([{"role": "tool", "content": "x"}], [], "role 'tool' must be system, user or assistant"),
        ([user({"type": "audio"})], [], "part .*audio.* has a type that is none of text, image, video"),
    ],
)
def test_what_cannot_be_used_is_named(
    tokenizer: Any, name: str, messages: list[Any], visual: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        chat_of(tokenizer, name).encode(messages, seen(visual))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user(text("x")), assistant(text("y"))], "needs one image or video"),
        ([user(IMAGE, IMAGE), assistant(text("y"))], "needs one image or video"),
        ([user(IMAGE), assistant(IMAGE, text("y"))], "needs one image or video"),
        ([user(IMAGE)], "needs a user and an assistant message"),
        ([user(IMAGE), assistant(text("y")), user(text("x")), assistant(text("y"))], "needs a user and an assistant"),
    ],
)
def test_the_plain_format_takes_captions_only(tokenizer: Any, messages: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat_of(tokenizer, "plain").encode(messages, seen([2]))


def test_complete_takes_ids_and_vocabulary_from_the_tokenizer(tokenizer: Any) -> None:
    filled = FAMILY.complete(SHAPES, tokenizer)
    assert filled["decoder"]["vocab"] == len(tokenizer) and "vocab" not in SHAPES["decoder"]
    fields = ("image_token_id", "video_token_id", "eos_token_id", "pad_token_id")
    names = tokenizer.convert_ids_to_tokens([filled[field] for field in fields])
    assert names == ["<image>", "<video>", "<|im_end|>", "<|endoftext|>"]
    assert FAMILY.complete({**SHAPES, "pad_token_id": 7}, tokenizer)["pad_token_id"] == 7


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token <image>"):
        FAMILY.complete(SHAPES, bare)


def test_other_ids_than_the_models_are_refused(tokenizer: Any) -> None:
    filled = {**FAMILY.complete(SHAPES, tokenizer), "video_token_id": 5, "vision": ViTShape(32, 1, 2, 44, 14)}
    config = validated(FAMILY.config_class, {**filled, "pinpoints": [[14, 14]]}, "model.config")
    for chat in FAMILY.chats.values():
        with pytest.raises(UserError, match=r"<video> has id \d+, model.config.video_token_id is 5"):
            chat(config, tokenizer)
