"""Make the data set and the tokenizer of the digits example: pictures of digits and questions on them.

    python examples/digits_vqa/prepare.py [--out DIR] [--train N] [--test N] [--seed S]

The digits are the 1,797 handwritten 8x8 scans that ship inside scikit-learn, so nothing is downloaded. They
are split into two disjoint pools, one for training and one held out; each picture shows 1 to 4 digits of one
pool in a row, on a canvas whose size and aspect ratio vary. What is written under `--out`:

    train.jsonl    a conversation a line, in the messages form of OpenAI and Hugging Face: 2 or 3 questions on
                   one picture; a small share have no picture at all; single digits first, to be read in order
    test.jsonl     one question a line, with its "kind"; each held-out picture is asked about once per kind
    images/        PNG files; the paths in the JSONL files are relative to those files
    tokenizer/     a byte-level BPE tokenizer with Qwen2-VL's special tokens and a ChatML chat template
    sources.json   which scikit-learn digits each picture shows, to show that none is in both splits
    settings.json  what it was made with; a second run with the same settings finds it and does nothing

All is drawn from `--seed`: the same settings give the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

FORMAT = 2  # raise it when the files written change, so that data made by an older version is made anew
CELL = 28  # pixels a digit's slot is wide: patch 14 x merge 2, so about one language-model token a digit
MOST_DIGITS = 4
SINGLES_UNTIL, MIXED_FROM = 0.12, 0.4  # parts of the training file, see `count_shares`
TRAIN_SHARE = 0.8  # of each class's digits
TEXT_ONLY_SHARE = 0.03
VOCAB_SIZE = 512

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

SYSTEM_PROMPT = "You are a helpful assistant."

CHAT_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}"
    "{{ message.content }}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{{ part.text }}"
    "{%- elif part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else -%}{{ raise_exception('a content part is of type text, image or video, not ' ~ part.type) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Question:
    """One kind of question on a picture: its wordings, and the answer as a function of the digits."""

    kind: str
    wordings: tuple[str, ...]
    answer: Callable[[Sequence[int]], str]


QUESTIONS = (
    Question(
        "read",
        ("Which digits are shown, left to right?", "Read the digits from left to right."),
        lambda digits: " ".join(str(digit) for digit in digits),
    ),
    Question("count", ("How many digits are shown?", "Count the digits."), lambda digits: str(len(digits))),
    Question(
        "largest",
        ("Which digit is the largest?", "Name the largest digit."),
        lambda digits: str(max(digits)),
    ),
)


@dataclass(frozen=True)
class Settings:
    """What decides the content of the data set; written as settings.json.

    train: training conversations. test: held-out pictures, one question a kind each. seed: of all choices.
    cell: pixels a digit's slot is wide.
    """

    train: int = 28_800
    test: int = 100
    seed: int = 0
    cell: int = CELL
    format: int = FORMAT


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: `scans_N88` float32, 0 paper to 1 ink; `labels_N` int64, 0 to 9."""

    scans_N88: NDArray[np.float32]
    labels_N: NDArray[np.int64]


def load_scans() -> Digits:
    """The 1,797 digits of `sklearn.datasets.load_digits` (the test part of UCI's Optdigits)."""
    from sklearn.datasets import load_digits  # here, for it takes a second and re-runs end before it

    data = load_digits()
    return Digits((data.images / 16.0).astype(np.float32), data.target.astype(np.int64))


def split_pools(labels_N: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Disjoint pools of digit indices, `{"train": ..., "test": ...}`, each class split by TRAIN_SHARE."""
    rng = np.random.default_rng([seed, 0])
    train, test = [], []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        cut = round(len(members) * TRAIN_SHARE)
        train.append(members[:cut])
        test.append(members[cut:])
    return {"train": np.concatenate(train), "test": np.concatenate(test)}


def count_shares(progress: float) -> NDArray[np.float64]:
    """Shares of pictures with 1 to MOST_DIGITS digits at a point of the training file, 0 its start, 1 its end.

    Training reads the file in order. It begins with single digits, then goes over to equal shares: models
    that were given all counts from the start counted within a hundred steps but read few digits for as long as they
    were tried, 250 to 850 steps; single digits alone are learned in a hundred.
    """
    mixed = np.clip((progress - SINGLES_UNTIL) / (MIXED_FROM - SINGLES_UNTIL), 0, 1)
    shares = np.full(MOST_DIGITS, mixed / MOST_DIGITS)
    shares[0] += 1 - mixed
    return shares


def draw_digit(scan_88: NDArray[np.float32], side: int, degrees: float) -> NDArray[np.float32]:
    """One scan enlarged to `side` x `side` pixels (bicubic) and rotated about its centre, in one resampling.

    Returns ink coverage, float32 [side, side] in 0..1.
    """
    scale, angle = 8 / side, np.deg2rad(degrees)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    half = side / 2
    # One blank pixel around the scan, so that the resampling fades out instead of cutting the ink off.
    source = Image.fromarray(np.pad(scan_88, 1))
    affine = (cos, sin, 5 - half * (cos + sin), -sin, cos, 5 - half * (cos - sin))
    enlarged = source.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(enlarged, dtype=np.float32), 0, 1)


def draw_picture(scans: NDArray[np.float32], cell: int, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of the scans [n, 8, 8] in adjacent cells of a row, left to right, like chalk on a board.

    The board is of a middle tone, since normalisation takes that to about 0: an empty cell then carries
    little, and most of what a digit's cell carries is its ink.

    The canvas is one or two rows of cells, give or take 7 % on each side: preprocessing rounds a side to a
    multiple of 28 px, and this bounds how much that stretches a digit. Each digit is somewhere inside a cell
    of its own, so that after that rounding it falls on one language-model token; a second row stays empty.
    """
    rows, columns = int(rng.integers(1, 3)), len(scans)
    height, width = (round(cells * cell * rng.uniform(0.93, 1.07)) for cells in (rows, columns))
    slot_height, slot_width = height / rows, width / columns
    row = int(rng.integers(rows))

    ink = np.zeros((height, width), dtype=np.float32)
    for column, scan in enumerate(scans):
        side = int(min(slot_height, slot_width) * rng.uniform(0.82, 1.0))
        x = int(column * slot_width + rng.uniform(0, slot_width - side))
        y = int(row * slot_height + rng.uniform(0, slot_height - side))
        ink[y : y + side, x : x + side] = draw_digit(scan, side, rng.uniform(-8, 8))

    board, chalk = rng.uniform(80, 150, 3), rng.uniform(230, 255, 3)
    rgb = board + (chalk - board) * ink[..., None]
    return Image.fromarray(rgb.round().astype(np.uint8), "RGB")


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def conversation(turns: Sequence[tuple[str, str]], image: str | None) -> list[dict[str, Any]]:
    """(question, answer) pairs as messages; the picture, if any, comes before the first question."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        user = [text_part(question)]
        if image is not None and not messages:
            user.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": [text_part(answer)]})
    return messages


def text_only_turns(rng: np.random.Generator) -> list[tuple[str, str]]:
    """One or two questions that need no picture."""
    turns = []
    for _ in range(rng.integers(1, 3)):
        low = int(rng.integers(9))
        if rng.random() < 0.5:
            turns.append((f"Which digit comes after {low}?", str(low + 1)))
        else:
            turns.append((f"Which digit comes before {low + 1}?", str(low)))
    return turns


def picture_turns(digits: Sequence[int], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two or three questions of different kinds, reading always among them, in random order and wording."""
    reading, *others = QUESTIONS
    chosen = [reading, *(others[i] for i in rng.permutation(len(others))[: rng.integers(1, 3)])]
    questions = [chosen[i] for i in rng.permutation(len(chosen))]
    return [(q.wordings[rng.integers(len(q.wordings))], q.answer(digits)) for q in questions]


@dataclass(frozen=True)
class Drawn:
    """One picture, the digits it shows, and the scikit-learn indices of their scans."""

    image: str
    digits: list[int]
    sources: list[int]


class Painter:
    """Draws the pictures of one split and saves them below `root`, as images/{split}/{number:06d}.png."""

    def __init__(self, root: Path, split: str, scans: Digits, pool: NDArray[np.int64], cell: int) -> None:
        self.root, self.split, self.scans, self.pool, self.cell = root, split, scans, pool, cell
        (root / "images" / split).mkdir(parents=True)

    def draw(self, number: int, shares: NDArray[np.float64], rng: np.random.Generator) -> Drawn:
        count = 1 + rng.choice(len(shares), p=shares)
        chosen = rng.choice(self.pool, size=count, replace=False)
        image = f"images/{self.split}/{number:06d}.png"
        picture = draw_picture(self.scans.scans_N88[chosen], self.cell, rng)
        picture.save(self.root / image, compress_level=1)
        return Drawn(image, self.scans.labels_N[chosen].tolist(), chosen.tolist())


def train_samples(
    painter: Painter, count: int, rng: np.random.Generator, sources: dict[str, list[int]]
) -> Iterator[dict[str, Any]]:
    """The training conversations, easy ones first; `sources` gains the scans of each picture drawn."""
    for number in range(1, count + 1):
        if rng.random() < TEXT_ONLY_SHARE:
            messages = conversation(text_only_turns(rng), None)
        else:
            drawn = painter.draw(number, count_shares(number / count), rng)
            sources[drawn.image] = drawn.sources
            messages = conversation(picture_turns(drawn.digits, rng), drawn.image)
        yield {"id": f"train-{number:06d}", "messages": messages}


def test_samples(
    painter: Painter, count: int, rng: np.random.Generator, sources: dict[str, list[int]]
) -> Iterator[dict[str, Any]]:
    """One sample per held-out picture and kind; `sources` gains the scans of each picture drawn."""
    for number in range(1, count + 1):
        drawn = painter.draw(number, count_shares(1.0), rng)
        sources[drawn.image] = drawn.sources
        for question in QUESTIONS:
            turn = (question.wordings[rng.integers(len(question.wordings))], question.answer(drawn.digits))
            yield {
                "id": f"test-{number:06d}-{question.kind}",
                "kind": question.kind,
                "messages": conversation([turn], drawn.image),
            }


def tokenizer_corpus() -> list[str]:
    """All questions of the example, the chat roles and the system prompt: what merges are learned from."""
    rng = np.random.default_rng(0)
    wordings = [wording for question in QUESTIONS for wording in question.wordings]
    text_only = [question for _ in range(100) for question, _ in text_only_turns(rng)]
    return [*wordings, *text_only, "system\n", "user\n", "assistant\n", SYSTEM_PROMPT]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE tokens, special ones included, in Hugging Face form.

    Any text can be encoded and decodes to itself. A digit is always a token of its own and never takes a
    space along, so "3 1 4" is 5 tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    # After the training: as in Qwen2, special tokens take the ids behind the ordinary ones.
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)

    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for sample in samples:
            lines.write(json.dumps(sample) + "\n")


def write_data_set(root: Path, settings: Settings, console: Console) -> None:
    """Writes everything the module's docstring lists below the existing, empty folder `root`."""
    scans = load_scans()
    pools = split_pools(scans.labels_N, settings.seed)
    sources: dict[str, list[int]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        plan = (
            ("train", settings.train, train_samples, 1),
            ("test", settings.test, test_samples, len(QUESTIONS)),
        )
        for stream, (split, count, samples, lines_each) in enumerate(plan, start=1):
            painter = Painter(root, split, scans, pools[split], settings.cell)
            rng = np.random.default_rng([settings.seed, stream])
            lines = samples(painter, count, rng, sources)
            task = f"{split} samples"
            write_jsonl(
                root / f"{split}.jsonl", progress.track(lines, total=count * lines_each, description=task)
            )
    write_tokenizer(root / "tokenizer")
    (root / "sources.json").write_text(json.dumps(sources) + "\n", encoding="utf-8")
    (root / "settings.json").write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether `out` holds a whole data set made with just these settings."""
    try:
        found = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == asdict(settings))


def prepare(out: Path, settings: Settings, console: Console) -> bool:
    """Makes the data set at `out`, or finds it there. Returns whether it was made now.

    It is written beside `out` and renamed when whole: an interrupted run leaves no half a data set at `out`.
    Raises FileExistsError when `out` holds something that is not a data set of this script.
    """
    if is_complete(out, settings):
        return False
    if out.exists() and not (out / "settings.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is no data set of this script; remove it or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        write_data_set(partial, settings, console)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def count_option(text: str) -> int:
    """A positive whole number, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the data set and the tokenizer of the digits example.")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_vqa/data"), help="folder to make")
    parser.add_argument("--train", type=count_option, default=Settings.train, help="training conversations")
    parser.add_argument("--test", type=count_option, default=Settings.test, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of every random choice")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"argument --seed: must be at least 0, got {options.seed}")

    console = Console()
    settings = Settings(options.train, options.test, options.seed)
    try:
        made = prepare(options.out, settings, console)
    except FileExistsError as error:
        parser.error(f"argument --out: {error}")
    questions = options.test * len(QUESTIONS)
    console.print(
        f"{'wrote' if made else 'found, nothing to do:'} {options.out}: {options.train} training "
        f"conversations, {options.test} held-out pictures with {questions} questions",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
