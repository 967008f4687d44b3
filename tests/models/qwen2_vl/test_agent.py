"""An agent's transcript: golden text, and what of it is learned."""

from __future__ import annotations

from typing import Any

import pytest

from tetrascope.engine.config_file import validated
from tetrascope.engine.data.sources.base import Blob
from tetrascope.engine.data.sources.conversation import record
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.chat import ChatML, render
from tetrascope.models.qwen2_vl.config import media

SCREEN, AFTER = media("image", (1, 2, 2), 2, size=(400, 800)), media("image", (1, 2, 4), 2, size=(1000, 100))
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SHAPES = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 1, "heads": 2},
    "mrope_section": [2, 3, 3],
}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


TAP = {"name": "tap", "description": "Taps the screen.", "parameters": {"point": "[x, y], thousandths"}}
ACTIONS = {"type": "actions", "actions": [TAP, {"name": "home"}]}

STEPS: list[dict[str, Any]] = [
    text("I open it."),
    {"type": "function", "name": "tap", "arguments": {"point": {"type": "point", "point": [200, 200]}, "times": 1}},
    {"type": "result", "image": "after.png"},
    {"type": "function", "name": "scroll", "arguments": {"area": {"type": "box", "box": [0, 0, 500, 100]}}},
    {"type": "result", "text": "done: 3 lines"},
    {"type": "return", "text": "It is ópen."},
]
MESSAGES = [
    turn("system", text("Be brief."), ACTIONS),
    turn("user", {"type": "image", "image": "screen.png"}, text("Open the door.")),
    turn("assistant", *STEPS),
]

LEARNED = (
    'I open it.\n*FUNCTION*: tap\n*ARGS*: {"point": [500, 250], "times": 1}\n*RESULT*:',
    '*FUNCTION*: scroll\n*ARGS*: {"area": [0, 0, 500, 999]}\n*RESULT*:',
    "*RETURN*: It is ópen.<|im_end|>",
)
"""What the assistant's turn is learned from: a point on the first picture, a box on the second."""


def test_golden_text() -> None:
    rendered, spans = render(MESSAGES, [SCREEN, AFTER])
    assert rendered == (
        "<|im_start|>system\nBe brief.\n\n# Functions\n\n"
        "Call a function by writing *FUNCTION*: and its name, and on the next line *ARGS*: and its arguments as a JSON "
        "object. What it gives follows after *RESULT*:. Write your answer after *RETURN*:.\n\n"
        '## tap\nTaps the screen.\nParameters: {"point": "[x, y], thousandths"}\n\n'
        "## home\nParameters: {}<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}Open the door.<|im_end|>\n"
        f"<|im_start|>assistant\n{LEARNED[0]} {IMAGE}\n{LEARNED[1]} done: 3 lines\n{LEARNED[2]}\n"
    )
    assert tuple(rendered[begin:end] for begin, end in spans) == LEARNED


def test_what_is_learned(tokenizer: Any) -> None:
    chat = ChatML(validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config"), tokenizer)
    ids, supervised = chat.encode(MESSAGES, [SCREEN, AFTER])
    runs: list[list[int]] = []
    for i, (token, learned) in enumerate(zip(ids.tolist(), supervised.tolist(), strict=True)):
        if learned and (i == 0 or not supervised[i - 1]):
            runs.append([])
        if learned:
            runs[-1].append(token)
    assert [tokenizer.decode(run, skip_special_tokens=False) for run in runs] == list(LEARNED)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((ids == pad).sum()) == 3 and not supervised[ids == pad].any()


def test_pictures_of_results_are_files_of_the_sample() -> None:
    files = record({"messages": MESSAGES}, "x", lambda path: f"data/{path}").files
    assert [(file.kind, file.blobs) for file in files] == [
        ("image", (Blob("data/screen.png"),)),
        ("image", (Blob("data/after.png"),)),
    ]


def test_what_follows_a_result_begins_on_a_line_of_its_own() -> None:
    rendered, spans = render([turn("assistant", {"type": "result", "text": "r"}, text("t"))], [])
    assert rendered.endswith("assistant\n*RESULT*: r\nt<|im_end|>\n")
    assert [rendered[begin:end] for begin, end in spans] == ["*RESULT*:", "t<|im_end|>"]
    rendered, spans = render([turn("assistant", {"type": "result", "text": "r\n"}, {"type": "return", "text": ""})], [])
    assert rendered.endswith("*RESULT*: r\n*RETURN*: <|im_end|>\n")
    video = {"type": "result", "video": ["1.png", "2.png"], "fps": 2}
    rendered, _ = render([turn("assistant", video)], [])
    assert rendered.endswith("*RESULT*: <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n")


def test_actions_alone_or_before_text() -> None:
    alone, _ = render([turn("system", {"type": "actions", "actions": [{"name": "home"}]})], [])
    assert alone.startswith("<|im_start|>system\n# Functions\n\nCall") and alone.endswith("Parameters: {}<|im_end|>\n")
    before, _ = render([turn("system", {"type": "actions", "actions": [{"name": "home"}]}, text("Be brief."))], [])
    assert before.endswith("## home\nParameters: {}\n\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize(
    ("role", "part", "message"),
    [
        ("user", {"type": "function", "name": "tap"}, "stands in a message of the user; it belongs to the assistant"),
        ("system", {"type": "return", "text": "x"}, "stands in a message of the system"),
        ("assistant", ACTIONS, "stands in a message of the assistant; it belongs to the system"),
        ("assistant", {"type": "function"}, '"name" must be the name of a function, on one line'),
        ("assistant", {"type": "function", "name": "a\nb"}, '"name" must be the name of a function'),
        ("assistant", {"type": "function", "name": "a", "arguments": [1]}, '"arguments" must be an object'),
        ("assistant", {"type": "function", "name": "a", "args": {}}, "has 'args'; its fields are name, arguments"),
        (
            "assistant",
            {"type": "function", "name": "a", "arguments": {"at": {"type": "point", "point": [1, 2]}}},
            "has no image",
        ),
        ("assistant", {"type": "result"}, "must have one of image, video, text"),
        ("assistant", {"type": "result", "image": "a.png", "text": "x"}, "must have one of image, video, text"),
        ("assistant", {"type": "result", "text": 3}, '"text" must be text'),
        ("assistant", {"type": "return"}, '"text" must be text'),
        ("system", {"type": "actions", "actions": []}, '"actions" must be a list of objects with a name'),
        ("system", {"type": "actions", "actions": [{"description": "x"}]}, '"name" must be the name of a function'),
        ("system", {"type": "actions", "actions": [{"name": "a", "parameters": 3}]}, '"parameters" an object'),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(role: str, part: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render([turn(role, part)], [])
