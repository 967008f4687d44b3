"""Ask an exported checkpoint the held-out questions of the digits example, with transformers alone.

    python examples/digits_vqa/evaluate.py HF_DIR [--data DIR] [--picture PNG] [--limit N] [--require SHARE]

HF_DIR is a Hugging Face Qwen2-VL directory: config.json, weights, tokenizer and preprocessor_config.json.
Nothing of the training engine is imported: what is measured is what any user of the checkpoint would get.

Each question of test.jsonl below `--data` is answered by greedy decoding, in batches padded on the left, and
counts as right when the answer equals the expected one character for character. Prints a table of exact match
per kind of question and the same figures as a line of JSON; `--picture` draws a dozen answers.

Exit code: 0; 1 when the overall exact match is below `--require`; 2 when an argument or file is unusable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE_PAD = "<|image_pad|>"
PICTURED = 12


class InputError(Exception):
    """A file or folder that cannot be evaluated; the message names it and says what was expected."""


@dataclass(frozen=True)
class Question:
    """One line of test.jsonl: `messages` ends before the assistant turn, whose text is `expected`."""

    id: str
    kind: str
    messages: list[dict[str, Any]]
    images: list[Path]
    text: str
    expected: str


@dataclass(frozen=True)
class Encoded:
    """One prompt: token ids, image placeholders expanded; its images' patches and grids (t, h, w)."""

    ids: list[int]
    patches: list[NDArray[np.float32]]
    grids: list[NDArray[np.int64]]


def message_text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def parse_question(line: str, folder: Path) -> Question:
    """One JSONL line, its image paths relative to `folder`. Raises KeyError, TypeError or ValueError."""
    sample = json.loads(line)
    *messages, answer = sample["messages"]
    if answer["role"] != "assistant" or not messages or messages[-1]["role"] != "user":
        raise ValueError("the last two messages must be a user's question and the assistant's answer")
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content]
    images = [folder / part["image"] for part in parts if part["type"] == "image"]
    kind = sample.get("kind", "question")
    return Question(sample["id"], kind, messages, images, message_text(messages[-1]), message_text(answer))


def read_questions(path: Path, limit: int | None) -> list[Question]:
    """The first `limit` questions of a JSONL file, or all of them. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; make it with: python examples/digits_vqa/prepare.py")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], start=1):
        try:
            questions.append(parse_question(line, path.parent))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: not a test sample: {error!r}") from error
    if not questions:
        raise InputError(f"{path} holds no question")
    return questions


class Checkpoint:
    """A Qwen2-VL checkpoint directory on the CPU, in float32: model, tokenizer, image processor."""

    def __init__(self, folder: Path) -> None:
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}; expected an exported Qwen2-VL checkpoint")
        local: dict[str, Any] = {"local_files_only": True}
        # from_pretrained leaves the model in evaluation mode.
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **local)
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **local)
        self.image_id = self.model.config.image_token_id
        if self.tokenizer.convert_tokens_to_ids(IMAGE_PAD) != self.image_id:
            raise InputError(
                f"{folder}: {IMAGE_PAD} is not token {self.image_id}, config.json's image_token_id"
            )

    def encode(self, question: Question) -> Encoded:
        """The prompt up to and including the assistant's header."""
        patches, grids = [], []
        for path in question.images:
            try:
                features = self.processor(Image.open(path), return_tensors="np")
            except OSError as error:
                raise InputError(f"{question.id}: image {path} cannot be read: {error}") from error
            patches.append(features["pixel_values"])
            grids.append(features["image_grid_thw"][0])

        prompt = self.tokenizer.apply_chat_template(
            question.messages, tokenize=False, add_generation_prompt=True
        )
        before, *rest = str(prompt).split(IMAGE_PAD)
        if len(rest) != len(grids):
            raise InputError(f"{question.id}: {len(rest)} {IMAGE_PAD} in the prompt for {len(grids)} images")
        merged = self.processor.merge_size**2
        for grid, after in zip(grids, rest, strict=True):
            before += IMAGE_PAD * (int(grid.prod()) // merged) + after
        return Encoded(self.tokenizer(before, add_special_tokens=False)["input_ids"], patches, grids)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of prompts, special tokens left out.

        Left padding is exact: the mask hides it, and transformers numbers positions (M-RoPE) from each
        prompt's first real token.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        ids_BT = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_BT[row, longest - len(prompt.ids) :] = 1
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "mm_token_type_ids": (ids_BT == self.image_id).int(),  # 0 text, 1 image
        }
        patches = [image for prompt in prompts for image in prompt.patches]
        grids = [grid for prompt in prompts for grid in prompt.grids]
        if patches:
            inputs["pixel_values"] = torch.from_numpy(np.concatenate(patches)).float()
            inputs["image_grid_thw"] = torch.from_numpy(np.stack(grids))
        out_BT = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        decoded: list[str] = self.tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
        return decoded

    def answers(self, questions: Sequence[Question], batch: int, console: Console) -> list[str]:
        """The answer to every question, in order."""
        # Room for the longest expected answer, its end mark, and a few tokens that show a run-on as one.
        longest = max(len(self.tokenizer(question.expected)["input_ids"]) for question in questions) + 4
        starts = range(0, len(questions), batch)
        found: list[str] = []
        for start in track(starts, description="answering", console=console, transient=True):
            prompts = [self.encode(question) for question in questions[start : start + batch]]
            found += self.generate(prompts, longest)
        return found


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """{kind: {"right", "count", "exact_match"}} in order of appearance, and the same for "overall" last."""
    counts: dict[str, list[int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        tally = counts.setdefault(question.kind, [0, 0])
        tally[0] += answer == question.expected
        tally[1] += 1
    counts["overall"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    return {
        kind: {"right": right, "count": total, "exact_match": right / total}
        for kind, (right, total) in counts.items()
    }


def score_table(scores: dict[str, dict[str, float]]) -> Table:
    table = Table(title="held-out questions, exact match")
    table.add_column("kind")
    for column in ("right", "questions", "exact match"):
        table.add_column(column, justify="right")
    for kind, row in scores.items():
        if kind == "overall":
            table.add_section()
        table.add_row(kind, f"{row['right']:.0f}", f"{row['count']:.0f}", f"{row['exact_match']:.1%}")
    return table


def pick_pictured(questions: Sequence[Question]) -> list[int]:
    """Up to PICTURED indices, spread evenly over the test set whatever the answers, each kind in its turn."""
    by_kind: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.images:
            by_kind.setdefault(question.kind, []).append(index)
    kinds = list(by_kind.values())
    wanted = min(PICTURED, sum(len(indices) for indices in kinds))
    picked: list[int] = []
    for turn in range(wanted):
        indices = kinds[turn % len(kinds)]
        place = turn * len(indices) // wanted
        picked.append(indices[place])
    return picked


def draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A green tick or a red cross of 18 px with its upper left corner at (x, y); fonts may lack the signs."""
    if right:
        draw.line([(x, y + 9), (x + 7, y + 16), (x + 18, y + 1)], fill=(22, 130, 60), width=4, joint="curve")
    else:
        draw.line([(x + 2, y + 1), (x + 17, y + 16)], fill=(200, 30, 30), width=4)
        draw.line([(x + 17, y + 1), (x + 2, y + 16)], fill=(200, 30, 30), width=4)


def draw_card(question: Question, answer: str) -> Image.Image:
    """A question's picture, enlarged, its text, the model's answer, and the right one where that is wrong."""
    width, height, room = 330, 246, (306, 130)
    right = answer == question.expected
    card = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, width - 1, height - 1), outline=(205, 205, 210))
    picture = Image.open(question.images[0]).convert("RGB")
    zoom = min(room[0] / picture.width, room[1] / picture.height)
    size = (round(picture.width * zoom), round(picture.height * zoom))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    card.paste(picture, ((width - size[0]) // 2, 12 + (room[1] - size[1]) // 2))
    draw.text((12, 154), question.text, font=ImageFont.load_default(size=15), fill=(90, 90, 100))
    draw_mark(draw, 12, 183, right)
    shown = answer if len(answer) <= 24 else answer[:23] + "..."
    draw.text((40, 178), shown or "(no answer)", font=ImageFont.load_default(size=22), fill=(15, 15, 20))
    if not right:
        expected = f"expected: {question.expected}"
        draw.text((12, 214), expected, font=ImageFont.load_default(size=15), fill=(200, 30, 30))
    return card


def draw_montage(questions: Sequence[Question], answers: Sequence[str], title: str) -> Image.Image:
    """The cards of `pick_pictured` in rows of three below a title."""
    cards = [draw_card(questions[index], answers[index]) for index in pick_pictured(questions)]
    columns, gap, head = 3, 10, 48
    if not cards:
        raise InputError("--picture: no question has an image to draw")
    width, height = cards[0].size
    rows = -(-len(cards) // columns)
    montage = Image.new(
        "RGB", (columns * (width + gap) + gap, head + rows * (height + gap)), color=(243, 243, 246)
    )
    ImageDraw.Draw(montage).text((gap, 12), title, font=ImageFont.load_default(size=20), fill=(15, 15, 20))
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        montage.paste(card, (gap + column * (width + gap), head + row * (height + gap)))
    return montage


def evaluate(options: argparse.Namespace, console: Console) -> float:
    """Answers, scores, prints and draws. Returns the overall exact match, 0 to 1. Raises InputError."""
    questions = read_questions(options.data / "test.jsonl", options.limit)
    answers = Checkpoint(options.checkpoint).answers(questions, options.batch, console)
    scores = score(questions, answers)
    overall = scores["overall"]
    console.print(score_table(scores))
    if options.picture is not None:
        title = f"{overall['right']:.0f} of {overall['count']:.0f} held-out questions right, for example:"
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_montage(questions, answers, title).save(options.picture, format="PNG")
        console.print(f"picture: {options.picture}", highlight=False, soft_wrap=True)
    print(json.dumps({"checkpoint": str(options.checkpoint), "scores": scores}), flush=True)
    return overall["exact_match"]


def count_option(text: str) -> int:
    """A positive whole number, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def share_option(text: str) -> float:
    """A share from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, such as 0.95, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask an exported checkpoint the held-out questions.")
    parser.add_argument("checkpoint", type=Path, metavar="HF_DIR", help="exported Hugging Face checkpoint")
    parser.add_argument("--data", type=Path, default=Path("runs/digits_vqa/data"), help="data of prepare.py")
    parser.add_argument("--picture", type=Path, help="PNG file to draw a dozen answers into")
    parser.add_argument("--limit", type=count_option, help="ask only the first N questions")
    parser.add_argument("--batch", type=count_option, default=50, help="questions answered at once")
    parser.add_argument("--require", type=share_option, default=0.0, help="least exact match for exit code 0")
    options = parser.parse_args(arguments)
    try:
        overall = evaluate(options, Console())
    except InputError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    if overall < options.require:
        print(f"overall exact match {overall:.3f} is below --require {options.require:.3f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
