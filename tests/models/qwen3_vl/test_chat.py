"""Qwen3-VL's ChatML: which tokens a conversation becomes, and which of them are learned from.

Golden token by token, with a tokenizer of one token a byte: what is supervised decides what a model learns, and no
shape or loss tells that it is wrong. The text of a video is what transformers' processor puts in its place.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tests.tiny import write_tokenizer
from tetrascope.engine.config_file import validated
from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.errors import UserError
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl.config import media
from tetrascope.models.qwen3_vl import FAMILY
from tetrascope.models.qwen3_vl.chat import ChatML, render
from tetrascope.models.qwen3_vl.preprocess import step_times

SHAPES = {
    "decoder": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2},
    "vision": {"width": 32, "layers": 1, "heads": 2, "mlp": 64, "deepstack": [0]},
    "mrope_section": [2, 3, 3],
}
IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": "a.mp4"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def image(tokens: int) -> Media:
    return media("image", (1, 2, 2 * tokens), 2)


def video(numbers: list[int], fps: float, tokens: int) -> Media:
    """A video with so many tokens for each pair of frames."""
    grid = (-(-len(numbers) // 2), 2, 2 * tokens)
    return media("video", grid, 2, numbers=tuple(numbers), times=step_times(numbers, fps, 2))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatML:
    folder: Path = tmp_path_factory.mktemp("chat") / "tokenizer"
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    return ChatML(validated(FAMILY.config_class, FAMILY.complete(SHAPES, tokenizer), "model.config"), tokenizer)


def marked(chat: ChatML, messages: list[dict[str, Any]], shown: list[Media]) -> str:
    """The text with what is supervised between { and }; special tokens as [x], short."""
    ids, supervised = chat.encode(messages, shown)
    assert ids.dtype == np.int64 and supervised.dtype == bool and ids.shape == supervised.shape
    out, on = "", False
    for i, learned in zip(ids, supervised, strict=True):
        if learned != on:
            out, on = out + ("{" if learned else "}"), bool(learned)
        out += chat._text._tokenizer.decode([i], skip_special_tokens=False)
    out += "}" if on else ""
    for token, short in (("im_start", "S"), ("im_end", "E"), ("vision_start", "v"), ("vision_end", "/v")):
        out = out.replace(f"<|{token}|>", f"[{short}]")
    return out.replace("<|image_pad|>", "I").replace("<|video_pad|>", "V")


def test_two_turns_with_an_image(chat: ChatML) -> None:
    messages = [
        user(IMAGE, text("Count.")),
        assistant(text("3")),
        user(text("What?")),
        assistant(text("3 1 4")),
    ]
    assert marked(chat, messages, [image(4)]) == (
        "[S]user\n[v]IIII[/v]Count.[E]\n[S]assistant\n{3[E]}\n[S]user\nWhat?[E]\n[S]assistant\n{3 1 4[E]}\n"
    )


def test_no_system_message_but_one_that_is_given(chat: ChatML) -> None:
    messages = [{"role": "user", "content": "y"}, assistant(text("z"))]
    plain = "[S]user\ny[E]\n[S]assistant\n{z[E]}\n"
    assert marked(chat, messages, []) == plain
    assert marked(chat, [{"role": "system", "content": "x"}, *messages], []) == "[S]system\nx[E]\n" + plain


def test_a_video_is_its_steps_with_their_times(chat: ChatML) -> None:
    shown = [image(1), video([0, 13, 26, 39, 52], 25.0, 2)]
    messages = [user(IMAGE, VIDEO, text("x")), assistant(text("y"))]
    assert marked(chat, messages, shown) == (
        "[S]user\n[v]I[/v]<0.3 seconds>[v]VV[/v]<1.3 seconds>[v]VV[/v]<2.1 seconds>[v]VV[/v]x[E]\n"
        "[S]assistant\n{y[E]}\n"
    )


@pytest.mark.parametrize(("count", "fps"), [(2, 24.0), (7, 30000 / 1001), (12, 2.0)])
def test_the_text_of_a_video_is_transformers(count: int, fps: float) -> None:
    numbers = np.linspace(0, 333, count).round().astype(int).tolist()
    one = video(numbers, fps, 3)
    hf = types.SimpleNamespace(
        video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
    )
    hf._calculate_timestamps = types.MethodType(Qwen3VLProcessor._calculate_timestamps, hf)
    inputs = {
        "video_grid_thw": np.array([one.grid]),
        "video_metadata": [types.SimpleNamespace(fps=fps, frames_indices=list(numbers))],
    }
    expected = Qwen3VLProcessor.replace_video_token(hf, inputs, 0)
    ours, _ = render([user(VIDEO)], [one])
    assert ours.replace("<|video_pad|>", "<|video_pad|>" * 3) == f"<|im_start|>user\n{expected}<|im_end|>\n"


def test_what_the_environment_shows_is_not_learned(chat: ChatML) -> None:
    # A picture in an assistant turn is what a tool returned; its borders and times come with it.
    messages = [user(text("x")), assistant(text("y"), IMAGE, text("z"), VIDEO, VIDEO, text("w"), text("u"))]
    shown = [image(2), video([0, 10], 10.0, 1), video([0, 20], 10.0, 1)]
    assert marked(chat, messages, shown).endswith(
        "[S]assistant\n{y}[v]II[/v]{z}<0.5 seconds>[v]V[/v]<1.0 seconds>[v]V[/v]{wu[E]}\n"
    )


@pytest.mark.parametrize(
    "answer", ["héllo", "数字 3", "a😀b", "e\u0301", " leading", "trailing ", "\nnew\n\nlines\n", ""]
)
def test_every_token_of_an_answer_is_supervised(chat: ChatML, answer: str) -> None:
    # Supervision comes from character offsets, which differ from bytes: the supervised tokens must be the answer.
    ids, supervised = chat.encode([user(text("q")), assistant(text(answer))], [])
    assert chat._text._tokenizer.decode(ids[supervised].tolist(), skip_special_tokens=False) == answer + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "shown", "message"),
    [
        ([user(text("x"))], [], "no assistant text to learn from"),
        ([], [], "no assistant text to learn from"),
        ([user(IMAGE), assistant(text("x"))], [image(4), image(4)], "1 image places but 2 images"),
        ([user(IMAGE, IMAGE), assistant(text("x"))], [image(4)], "more image places than its 1 images"),
        ([user(VIDEO), assistant(text("x"))], [image(4)], "place for a video where its files have a image"),
        ([user(text("<|image_pad|>")), assistant(text("x"))], [], "1 image places but 0 images"),
        ([{"role": "tool", "content": "x"}], [], "role 'tool' must be system, user or assistant"),
        ([user({"type": "audio"})], [], "part .*audio.* has a type that is none of"),
        ([user(text("\ud83d")), assistant(text("x"))], [], "not Unicode text .surrogates not allowed"),
    ],
)
def test_what_cannot_be_used_is_named(chat: ChatML, messages: list[Any], shown: list[Media], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat.encode(messages, shown)
