"""Boxes and points: golden text, and everything that would put a box somewhere else is refused.

A box that is scaled by the wrong picture or side looks like any other in the training data: nothing else would tell.
"""

from __future__ import annotations

from typing import Any

import pytest

from tetrascope.errors import UserError
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.chat import ChatML, render
from tetrascope.models.qwen2_vl.config import media

IMAGE = {"type": "image", "image": "a.png"}
WIDE, TALL = media("image", (1, 2, 4), 2, size=(640, 480)), media("image", (1, 4, 2), 2, size=(300, 1200))
CLIP = media("video", (2, 2, 2), 2, size=(100, 100))
SHAPES = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 1, "heads": 2},
    "mrope_section": [2, 3, 3],
}


def box(*corners: Any, **more: Any) -> dict[str, Any]:
    return {"type": "box", "box": list(corners), **more}


def point(*place: Any, **more: Any) -> dict[str, Any]:
    return {"type": "point", "point": list(place), **more}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def grounded(part: dict[str, Any], *pictures: Media) -> str:
    """What a part becomes after the pictures, without what is around it."""
    shown = [{**IMAGE, "type": one.kind} for one in pictures]
    text, _ = render([turn("user", *shown), turn("assistant", part)], pictures)
    return text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            box(64, 48, 320, 240, object="the red car"),
            "<|object_ref_start|>the red car<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>",
        ),
        (box(64, 48, 320, 240), "<|box_start|>(100,100),(500,500)<|box_end|>"),
        (box(0, 0, 640, 480), "<|box_start|>(0,0),(999,999)<|box_end|>"),  # the far edge is inside [0, 1000)
        (box(1, 1, 639, 479), "<|box_start|>(1,2),(998,997)<|box_end|>"),  # rounded down
        (box(32.5, 24.5, 32.5, 24.5), "<|box_start|>(50,51),(50,51)<|box_end|>"),
        (
            point(320, 120, object="wheel"),
            "<|object_ref_start|>wheel<|object_ref_end|><|box_start|>(500,250)<|box_end|>",
        ),
        (point(640, 0), "<|box_start|>(999,0)<|box_end|>"),
    ],
)
def test_golden_text(part: dict[str, Any], expected: str) -> None:
    assert grounded(part, WIDE) == expected


def test_the_picture_is_the_last_one_before_unless_another_is_named() -> None:
    middle = "<|box_start|>(500,500)<|box_end|>"
    assert grounded(point(150, 600), WIDE, TALL) == middle
    assert grounded(point(320, 240, of=0), WIDE, TALL) == middle
    assert grounded(point(150, 600, of=1), WIDE, TALL) == middle
    assert grounded(point(320, 240), WIDE, CLIP) == middle  # videos are not counted
    text, _ = render([turn("user", IMAGE, point(320, 240), IMAGE, point(150, 600))], [WIDE, TALL])
    assert text.count(middle) == 2
    text, _ = render([turn("user", point(150, 600, of=1), IMAGE), turn("user", IMAGE)], [WIDE, TALL])
    assert text.count(middle) == 1  # a question that comes before its picture


@pytest.mark.parametrize(
    ("part", "pictures", "message"),
    [
        (box(0, 0, 641, 480), [WIDE], "lies outside its image of 640x480 pixels"),
        (box(0, -1, 640, 480), [WIDE], "lies outside its image"),
        (point(10, 481), [WIDE], "lies outside its image"),
        (point(301, 10), [WIDE, TALL], "lies outside its image of 300x1200 pixels"),
        (box(10, 10, 5, 20), [WIDE], "expected x1 <= x2 and y1 <= y2; swap the corners"),
        (box(10, 10, 20, 9), [WIDE], "expected x1 <= x2 and y1 <= y2"),
        (box(1, 2, 3), [WIDE], '"box" must be 4 numbers, in pixels'),
        (box(1, 2, 3, "4"), [WIDE], '"box" must be 4 numbers'),
        (box(1, 2, 3, True), [WIDE], '"box" must be 4 numbers'),
        (point(1, float("nan")), [WIDE], '"point" must be 2 numbers'),
        ({"type": "box", "bbox": [1, 2, 3, 4]}, [WIDE], "has 'bbox'; its fields are object, box, of"),
        ({"type": "box"}, [WIDE], '"box" must be 4 numbers'),
        (box(1, 2, 3, 4, object=5), [WIDE], '"object" must be text'),
        (box(1, 2, 3, 4), [], "has no image: 0 come before it and the conversation has 0"),
        (box(1, 2, 3, 4, of=1), [WIDE], 'has no image: 1 come before it .* as "of", from 0'),
        (box(1, 2, 3, 4, of=-1), [WIDE], "has no image"),
        (box(1, 2, 3, 4, of="0"), [WIDE], "has no image"),
        (box(1, 2, 3, 4), [CLIP], "has no image"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_named(part: dict[str, Any], pictures: list[Media], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grounded(part, *pictures)


def chat_of(tokenizer: Any) -> ChatML:
    from tetrascope.engine.config_file import validated

    return ChatML(validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config"), tokenizer)


def test_boxes_of_the_assistant_are_learned_and_those_of_the_user_are_not(tokenizer: Any) -> None:
    messages = [turn("user", IMAGE, box(64, 48, 320, 240)), turn("assistant", box(0, 0, 320, 240, object="3"))]
    ids, supervised = chat_of(tokenizer).encode(messages, [WIDE])
    learned = tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False)
    assert learned == ("<|object_ref_start|>3<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|><|im_end|>")
    assert tokenizer.convert_tokens_to_ids("<|box_start|>") in ids[supervised]


def test_a_tokenizer_without_box_tokens_is_refused(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    bare.add_special_tokens({"additional_special_tokens": specials})
    chat = chat_of(bare)
    with pytest.raises(UserError, match=r"data\.tokenizer: has no token <\|box_start\|>, which boxes need"):
        chat.encode([turn("user", IMAGE), turn("assistant", box(0, 0, 320, 240))], [WIDE])
    chat.encode([turn("user", IMAGE), turn("assistant", {"type": "text", "text": "x"})], [WIDE])


def test_text_across_parts_is_learned_as_one(tokenizer: Any) -> None:
    # "an" and "swer" are one word of the text; a token that reaches across the seam belongs to the answer.
    parts = [{"type": "text", "text": words} for words in ("an", "swer ", "in", " parts")]
    ids, supervised = chat_of(tokenizer).encode([turn("user"), turn("assistant", *parts)], [])
    assert tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False) == "answer in parts<|im_end|>"
