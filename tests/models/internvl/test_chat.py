"""InternVL's chat formats: which tokens a conversation becomes, and which of them are learned from.

Golden, character by character: the tests' tokenizer has one token a byte, so text and supervision can be read. What
stands for pictures and frames is compared with transformers' own processor.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers.models.internvl.processing_internvl import InternVLProcessor

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.models.internvl import FAMILY
from tetrascope.models.internvl.chat import FORMATS, render
from tetrascope.models.internvl.config import InternVLConfig, framed, tiled
from tetrascope.models.media import Media
from tetrascope.tools.verify.families.internvl import tiny_config

SHAPES: dict[str, Any] = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 1, "heads": 2, "mlp": 64, "image": 56},
}
IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}
CHINESE = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def config_of(tokenizer: Any, **changes: Any) -> InternVLConfig:
    config: InternVLConfig = validated(
        FAMILY.config_class, FAMILY.complete({**SHAPES, **changes}, tokenizer), "model.config"
    )
    return config


def picture(tiles: int) -> Media:
    return tiled(tiny_config(), (tiles, 1, 12), tiles)


def marked(tokenizer: Any, name: str, messages: list[Any], media: list[Media], **changes: Any) -> str:
    """The text of a conversation with supervised runs in [[ ]], and n visual tokens as (n)."""
    config = config_of(tokenizer, **changes)
    ids, supervised = FAMILY.chats[name](config, tokenizer).encode(messages, media)
    assert ids.dtype == np.int64 and supervised.dtype == bool and ids.shape == supervised.shape
    borders = [0, *np.flatnonzero(np.diff(supervised)) + 1, len(ids)]
    found = ""
    for start, stop in pairwise(borders):
        words = tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
        found += f"[[{words}]]" if supervised[start] else words
    for n in (24, 12, 8, 4):
        found = found.replace("<IMG_CONTEXT>" * n, f"({n})")
    return found


TURNS = [said("user", IMAGE, text("What?")), said("assistant", text("A cat.")), said("user", text("Sure?"))]


def test_internlm2_chat(tokenizer: Any) -> None:
    found = marked(tokenizer, "internlm2-chat", [*TURNS, said("assistant", text("Yes."))], [picture(3)])
    assert found == (
        f"<|im_start|>system\n{CHINESE}<|im_end|>"
        "<|im_start|>user\n<img>(12)</img>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n[[A cat.<|im_end|>]]"
        "<|im_start|>user\nSure?<|im_end|>"
        "<|im_start|>assistant\n[[Yes.<|im_end|>]]"
    )


def test_internvl2_5_has_newlines_after_turns(tokenizer: Any) -> None:
    found = marked(tokenizer, "internvl2_5", [*TURNS, said("assistant", text("Yes."))], [picture(2)])
    assert found == (
        f"<|im_start|>system\n{FORMATS['internvl2_5'].system}<|im_end|>\n"
        "<|im_start|>user\n<img>(8)</img>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n[[A cat.<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n[[Yes.<|im_end|>]]\n"
    )


def test_every_frame_of_a_video_is_a_line(tokenizer: Any) -> None:
    messages = [said("user", VIDEO, text("x"), IMAGE), said("assistant", text("y"))]
    found = marked(tokenizer, "internvl2_5", messages, [framed(tiny_config(), 3), picture(1)], system_message="")
    frames = "".join(f"Frame{i}: <img>(4)</img>\n" for i in (1, 2, 3))
    assert found == (f"<|im_start|>user\n{frames}x<img>(4)</img>\n<|im_end|>\n<|im_start|>assistant\n[[y<|im_end|>]]\n")


def test_pictures_and_frames_are_written_as_transformers_writes_them() -> None:
    theirs: Any = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=1
    )
    for frames in (1, 12):
        pixels = {"pixel_values_videos": [np.zeros((frames, 3, 4, 4))]}
        expected = InternVLProcessor.replace_video_token(theirs, pixels, 0)
        written, _ = render([said("user", VIDEO)], [framed(tiny_config(), frames)], "", "")
        assert written == f"<|im_start|>user\n{expected}\n<|im_end|>"
    expected = InternVLProcessor.replace_image_token(theirs, {"num_patches": [1]}, 0)
    assert render([said("user", IMAGE)], [picture(1)], "", "")[0] == f"<|im_start|>user\n{expected}\n<|im_end|>"


@pytest.mark.parametrize("name", ["internlm2-chat", "internvl2_5"])
def test_a_tokenizers_beginning_of_text_comes_first(name: str, tokenizer_with_bos: Any) -> None:
    found = marked(tokenizer_with_bos, name, [said("user", text("x")), said("assistant", text("y"))], [])
    assert found.startswith("<s><|im_start|>system\n") and found.count("<s>") == 1


def test_whose_system_message_counts(tokenizer: Any) -> None:
    turns = [said("user", text("x")), said("assistant", text("y"))]
    rest = "<|im_start|>user\nx<|im_end|><|im_start|>assistant\n[[y<|im_end|>]]"
    for mine, own, expected in (
        ("Mine.", None, "<|im_start|>system\nMine.<|im_end|>"),
        ("", None, ""),
        ("Mine.", "Own.", "<|im_start|>system\nOwn.<|im_end|>"),
        (None, "Own.", "<|im_start|>system\nOwn.<|im_end|>"),
    ):
        messages = turns if own is None else [{"role": "system", "content": own}, *turns]
        assert marked(tokenizer, "internlm2-chat", messages, [], system_message=mine) == expected + rest


@pytest.mark.parametrize(
    ("kind", "template", "same"),
    [
        ("internlm2", "", "internlm2-chat"),
        ("qwen2", "", "internvl2_5"),
        ("llama", "", "internvl2_5"),
        ("internlm2", "internvl2_5", "internvl2_5"),
        ("qwen2", "Hermes-2", "internlm2-chat"),
    ],
)
def test_the_checkpoint_says_which_format_is_the_default(kind: str, template: str, same: str, tokenizer: Any) -> None:
    assert next(iter(FAMILY.chats)) == "template"
    decoder = {**SHAPES["decoder"], "kind": kind, "qkv_bias": kind == "qwen2"}
    turns = [said("user", text("x")), said("assistant", text("y"))]
    found = [marked(tokenizer, name, turns, [], decoder=decoder, template=template) for name in ("template", same)]
    assert found[0] == found[1]


def test_pictures_inside_an_answer_are_not_learned(tokenizer: Any) -> None:
    # A picture in an assistant turn is what a tool returned; its borders and its line come with it.
    messages = [said("user", text("x")), said("assistant", text("a"), text("b"), IMAGE, text("c"))]
    found = marked(tokenizer, "internvl2_5", messages, [picture(2)], system_message="")
    assert found.endswith("<|im_start|>assistant\n[[ab]]<img>(8)</img>\n[[c<|im_end|>]]\n")


@pytest.mark.parametrize("answer", ["héllo", "数字 3", "a😀b", " leading", "trailing ", "\nnew\n\nlines\n", ""])
def test_every_token_of_an_answer_is_supervised(answer: str, tokenizer: Any) -> None:
    chat = FAMILY.chats["internvl2_5"](config_of(tokenizer), tokenizer)
    ids, supervised = chat.encode([said("user", text("q")), said("assistant", text(answer))], [])
    assert tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False) == answer + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "media", "message"),
    [
        ([said("user", text("x"))], [], "no assistant text to learn from"),
        ([said("user", IMAGE), said("assistant", text("x"))], [], "no image belongs to"),
        ([said("user", VIDEO), said("assistant", text("x"))], [picture(1)], "no video belongs to"),
        ([said("user", text("")), said("assistant", text("x"))], [picture(1)], "0 image places but 1 images"),
        ([said("user", text("<IMG_CONTEXT>")), said("assistant", text("x"))], [], "1 image places but 0 images"),
        ([said("user", {"type": "audio"})], [], "part .*audio.* has a type that is none of"),
        ([said("tool", text("x"))], [], "role 'tool' must be system, user or assistant"),
    ],
)
def test_what_cannot_be_used_is_named(messages: list[Any], media: list[Media], message: str, tokenizer: Any) -> None:
    chat = FAMILY.chats["internvl2_5"](config_of(tokenizer), tokenizer)
    with pytest.raises(UserError, match=message):
        chat.encode(messages, media)


def test_another_models_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"<IMG_CONTEXT> is token \d+, the model's image_token_id is 7"):
        FAMILY.chats["template"](config_of(tokenizer, image_token_id=7), tokenizer)


def test_complete_takes_ids_and_vocabulary_from_the_tokenizer(tokenizer: Any) -> None:
    filled = FAMILY.complete(SHAPES, tokenizer)
    assert filled["decoder"]["vocab"] == len(tokenizer)
    names = {field: tokenizer.convert_ids_to_tokens(filled[field]) for field in filled if field.endswith("_token_id")}
    assert names == {
        "image_token_id": "<IMG_CONTEXT>",
        "eos_token_id": "<|im_end|>",
        "pad_token_id": "<|endoftext|>",
    }
    assert "vocab" not in SHAPES["decoder"]  # the configuration it was given is left alone


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token <IMG_CONTEXT>"):
        FAMILY.complete(SHAPES, bare)
