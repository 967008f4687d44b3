"""Rows of every form become the same messages and files.

The oracle is one conversation with an image and a video, written by hand in each form: all must give the same record.
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tetrascope.engine.data.sources.base import BadSample, Blob, MediaFile
from tetrascope.engine.data.sources.conversation import record

PNG = b"\x89PNG not really"
ANSWER = {"role": "assistant", "content": "A cat."}
PARTS = [{"type": "image", "image": "/r/a.png"}, {"type": "text", "text": "Which?"}, {"type": "video", "video": "/r/v"}]
MESSAGES = [{"role": "user", "content": PARTS}, ANSWER]
FILES = (MediaFile("image", (Blob("/r/a.png"),)), MediaFile("video", (Blob("/r/v"),)))


def resolve(path: str) -> str:
    return f"/r/{path}"


def user(*parts: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **row}


TEXT = {"type": "text", "text": "Which?"}
FORMS: dict[str, dict[str, Any]] = {
    "ours": user({"type": "image", "image": "a.png"}, TEXT, {"type": "video", "video": "v"}),
    "openai": user(
        {"type": "image_url", "image_url": {"url": "a.png"}}, TEXT, {"type": "video_url", "video_url": {"url": "v"}}
    ),
    "openai, short": user({"type": "image_url", "image_url": "a.png"}, TEXT, {"type": "video_url", "video_url": "v"}),
    "hugging face": user({"type": "image"}, TEXT, {"type": "video"}, images=["a.png"], videos=["v"]),
    "hugging face, single": user({"type": "image"}, TEXT, {"type": "video"}, image="a.png", video="v"),
    "hugging face, of arrow": user(
        {"type": "image", "text": None, "image": None, "video": None},
        {"type": "text", "text": "Which?", "image": None, "video": None},
        {"type": "video", "text": None, "image": None, "video": None},
        image=None,
        images=[{"bytes": None, "path": "a.png"}],
        videos=["v"],
    ),
    "llava": {
        "conversations": [
            {"from": "human", "value": "<image>\nWhich?<video>"},
            {"from": "gpt", "value": "A cat."},
        ],
        "image": "a.png",
        "video": "v",
    },
    "llava, lists": {
        "conversations": [{"from": "human", "value": "<image>Which?<video>"}, {"from": "gpt", "value": "A cat."}],
        "image": ["a.png"],
        "video": ["v"],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_give_the_same_record(form: str) -> None:
    found = record({"id": 7, **FORMS[form]}, "line 1", resolve)
    shown = [
        {**m, "content": [{k: v for k, v in p.items() if v is not None} for p in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in found.messages or []
    ]
    expected = [MESSAGES[0], {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    assert shown == (expected if "llava" in form else MESSAGES)
    assert found.files == FILES
    assert (found.name, found.tokens) == ("7", None)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}},
        {"type": "image", "image": "data:;base64," + base64.b64encode(PNG).decode()},
        {"type": "image", "image": PNG},
        {"type": "image", "image": bytearray(PNG)},
        {"type": "image", "image": {"bytes": PNG, "path": "of-another-machine.png"}},
    ],
)
def test_bytes_in_the_row(part: dict[str, Any]) -> None:
    found = record(user(part), "line 1", resolve)
    assert [blob.data for file in found.files for blob in file.blobs] == [PNG]
    assert PNG not in found.messages[0]["content"][0].values()  # type: ignore[index]  # they are in `files` only


def test_bytes_in_an_archive() -> None:
    blob = Blob("shard.tar", 512, 99)
    assert record(user({"type": "image", "image": "x"}), "", lambda name: blob).files[0].blobs == (blob,)


def test_llava_puts_files_where_their_marks_are() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\n<image>\nSame?"},
        {"from": "gpt", "value": "No."},
        {"from": "human", "value": "And this: <image>"},
        {"from": "gpt", "value": "Yes."},
    ]
    found = record({"conversations": turns, "image": ["a", "b", "c"]}, "line 3", resolve)
    image = {name: {"type": "image", "image": f"/r/{name}"} for name in "abc"}
    assert [m["role"] for m in found.messages or []] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in found.messages or []] == [
        [{"type": "text", "text": "Be brief."}],
        [image["a"], image["b"], {"type": "text", "text": "Same?"}],
        [{"type": "text", "text": "No."}],
        [{"type": "text", "text": "And this: "}, image["c"]],
        [{"type": "text", "text": "Yes."}],
    ]
    assert [file.blobs[0].url for file in found.files] == ["/r/a", "/r/b", "/r/c"]
    assert found.name == "line 3"


def test_a_video_of_pictures() -> None:
    found = record(user({"type": "video", "video": ["0.png", "1.png"], "fps": 2}), "", resolve)
    assert found.files == (MediaFile("video", (Blob("/r/0.png"), Blob("/r/1.png")), 2.0),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object"),
        ({"text": "x"}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "must be an object"),
        (user({"type": "image"}), "image"),
        (user({"type": "image"}, {"type": "image"}, images=["a"]), "image"),
        (user(TEXT, images=["a", "b"]), "2 images more"),
        (user({"type": "image", "image": "a"}, image="b"), "1 images more"),
        (user({"type": "image"}, images=[None]), "image"),
        (user({"type": "image", "image": ""}), "expected the path"),
        (user({"type": "image", "image": 3}), "expected the path"),
        (user({"type": "image", "image": {"bytes": None, "path": None}}), "expected the path"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}), "base64"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}), "base64"),
        (user({"type": "video", "video": []}), "expected the path"),
        (user({"type": "video", "video": ["a"], "fps": 0}), "fps"),
        (user({"type": "video", "video": ["a"], "fps": True}), "fps"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "image"),
        ({"conversations": [{"from": "human", "value": "x"}], "image": "a"}, "1 images more"),
        ({"conversations": [{"from": "human", "value": "<image><image>"}], "image": ["a"]}, "image"),
        ({"conversations": [{"from": "someone", "value": "x"}]}, "must have from"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "must have from"),
        ({"conversations": [{"from": "human", "value": None}]}, "must have from"),
        ({"conversations": ["x"]}, "must have from"),
    ],
)
def test_bad_rows(row: Any, message: str) -> None:
    with pytest.raises(BadSample, match=message) as found:
        record(row, "line 9", resolve)
    assert found.value.kind == "bad json"
    assert "line 9" in str(found.value)
