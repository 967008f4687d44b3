"""Make the data of the mixed example: short text, single pictures, several pictures, and videos.

    python examples/mixed/prepare.py [--out DIR] [--seed S]

All of it is real and ships inside scikit-learn, so nothing is downloaded: text and numbers of its Iris data set, and
crops of its two photographs, in many sizes and shapes; videos pan or zoom over a photograph. What is written under
`--out`:

    text.jsonl      measurements of flowers and which iris each is, in 1 to 8 turns
    image.jsonl     a picture and questions on it
    several.jsonl   2 to 5 pictures and a question that takes all of them
    video.jsonl     a video and how the camera moves
    images/, videos/  JPEG and MPEG-4 files; the paths in the JSONL files are relative to those files
    tokenizer/      a byte-level BPE tokenizer with Qwen2-VL's special tokens
    settings.json   what it was made with; a second run with the same settings finds it and does nothing

All is drawn from `--seed`: the same settings give the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageStat
from sklearn.datasets import load_iris, load_sample_images

from tetrascope.models.qwen2_vl.config import SPECIAL_TOKENS

FORMAT = 1  # raise it when the files written change, so that data made by an older version is made anew
VOCAB_SIZE = 1024
FRAMES_A_SECOND = 8
NAMES = ("a temple in China", "a flower")
"""What scikit-learn's two photographs show, in its order."""

MOVES = ("zooms in", "zooms out", "pans to the left", "pans to the right")
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of a photograph."""


@dataclass(frozen=True)
class Settings:
    """What decides the content of the data: samples of each source, and the seed of all choices."""

    text: int = 400
    image: int = 240
    several: int = 120
    video: int = 80
    seed: int = 0
    format: int = FORMAT


def photographs() -> list[Image.Image]:
    """scikit-learn's china.jpg and flower.jpg, 640 x 427 pixels each."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def conversation(turns: Sequence[tuple[str, str]], before: Sequence[dict[str, str]] = ()) -> list[dict[str, Any]]:
    """(question, answer) pairs as messages; the parts `before` come before the first question."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        parts = [*(before if not messages else ()), {"type": "text", "text": question}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return messages


def side(rng: np.random.Generator, least: int, most: int) -> int:
    """A length in pixels; small ones more often than large ones."""
    return int(np.exp(rng.uniform(np.log(least), np.log(most + 1))))


def text_samples(count: int, rng: np.random.Generator) -> Iterator[list[dict[str, Any]]]:
    """Flowers of the Iris data set (R. A. Fisher, 1936) and their species."""
    iris = load_iris()
    for _ in range(count):
        turns = []
        for number in rng.choice(len(iris.target), size=rng.integers(1, 9), replace=False).tolist():
            of_sepal, of_petal = iris.data[number, :2], iris.data[number, 2:]
            question = (
                f"A flower has a sepal of {of_sepal[0]:.1f} x {of_sepal[1]:.1f} cm and a petal of "
                f"{of_petal[0]:.1f} x {of_petal[1]:.1f} cm. Which iris is it?"
            )
            turns.append((question, f"It is an Iris {iris.target_names[iris.target[number]]}."))
        yield conversation(turns)


class Painter:
    """Cuts pictures out of the photographs and saves them below `root`."""

    def __init__(self, root: Path, rng: np.random.Generator) -> None:
        self.root, self.rng, self.photographs = root, rng, photographs()
        self.made = 0
        (root / "images").mkdir()
        (root / "videos").mkdir()

    def crop(self, of: int, most: int) -> tuple[str, Image.Image]:
        """A crop of photograph `of`, 56 to `most` pixels a side: its path and the picture."""
        photograph = self.photographs[of]
        width, height = side(self.rng, 56, most), side(self.rng, 56, min(most, photograph.height))
        left = int(self.rng.integers(photograph.width - width + 1))
        top = int(self.rng.integers(photograph.height - height + 1))
        picture = photograph.crop((left, top, left + width, top + height))
        self.made += 1
        path = f"images/{self.made:04d}.jpg"
        picture.save(self.root / path, quality=85)
        return path, picture

    def video(self, of: int, move: str) -> str:
        """A video of 2 to 6 seconds over photograph `of`: its path."""
        photograph = self.photographs[of]
        width, height = (2 * int(self.rng.integers(48, 113)) for _ in range(2))
        begin, end = path_of(move, photograph.width, photograph.height, width / height, self.rng)
        frames = int(self.rng.integers(2 * FRAMES_A_SECOND, 6 * FRAMES_A_SECOND + 1))
        self.made += 1
        path = f"videos/{self.made:04d}.mp4"
        with av.open(str(self.root / path), "w", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("mpeg4", rate=FRAMES_A_SECOND, options={"threads": "1", "flags": "+bitexact"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for view in np.linspace(begin, end, frames):
                picture = photograph.resize((width, height), Image.Resampling.BILINEAR, box=tuple(view))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        return path


def path_of(move: str, width: int, height: int, aspect: float, rng: np.random.Generator) -> tuple[Box, Box]:
    """First and last field of view of a camera that moves so; both `aspect` times as wide as high."""
    most = 0.999 * min(height, width / aspect)  # a little less: sums of floats must not lead out of the photograph
    tall = most * rng.uniform(0.4, 0.6)

    def view(tall: float, left: float, top: float) -> Box:
        """So many pixels high; left and top as shares of the room there is."""
        x, y = left * (width - aspect * tall), top * (height - tall)
        return (x, y, x + aspect * tall, y + tall)

    if move.startswith("zooms"):
        near, far = view(tall, *rng.random(2)), view(most, *rng.random(2))
        return (far, near) if move == "zooms in" else (near, far)
    top = rng.random()
    left, right = view(tall, 0.0, top), view(tall, 0.999, top)
    return (left, right) if move == "pans to the right" else (right, left)


def image_samples(count: int, painter: Painter) -> Iterator[list[dict[str, Any]]]:
    for _ in range(count):
        of = int(painter.rng.integers(2))
        path, picture = painter.crop(of, 420)
        colour = int(np.argmax(ImageStat.Stat(picture).mean))
        turns = [
            ("What does the photograph show?", f"It shows a part of {NAMES[of]}."),
            ("Which of red, green and blue is strongest in it?", f"On average, {('red', 'green', 'blue')[colour]} is."),
            ("How large is it?", f"It is {picture.width} pixels wide and {picture.height} high."),
        ]
        yield conversation(turns[: painter.rng.integers(1, 4)], [{"type": "image", "image": path}])


def several_samples(count: int, painter: Painter) -> Iterator[list[dict[str, Any]]]:
    for _ in range(count):
        shown = painter.rng.integers(2, size=painter.rng.integers(2, 6)).tolist()
        parts = [{"type": "image", "image": painter.crop(of, 252)[0]} for of in shown]
        numbers = [str(number) for number, of in enumerate(shown, start=1) if of == 1]
        answer = f"Number {' and number '.join(numbers)}." if numbers else "None of them."
        yield conversation([("Which of these pictures show a flower?", answer)], parts)


def video_samples(count: int, painter: Painter) -> Iterator[list[dict[str, Any]]]:
    for _ in range(count):
        of, move = int(painter.rng.integers(2)), MOVES[painter.rng.integers(len(MOVES))]
        part = {"type": "video", "video": painter.video(of, move)}
        yield conversation([("How does the camera move?", f"It {move} over {NAMES[of]}.")], [part])


def write_tokenizer(folder: Path, corpus: Sequence[str]) -> None:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE tokens in Hugging Face form. Any text can be encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [*SPECIAL_TOKENS.values(), "<|im_start|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS["eos_token_id"],
        "pad_token": SPECIAL_TOKENS["pad_token_id"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write(root: Path, settings: Settings) -> None:
    """Writes everything the module's docstring lists below the existing, empty folder `root`."""
    painter = Painter(root, np.random.default_rng([settings.seed, 1]))
    sources = {
        "text": text_samples(settings.text, np.random.default_rng([settings.seed, 0])),
        "image": image_samples(settings.image, painter),
        "several": several_samples(settings.several, painter),
        "video": video_samples(settings.video, painter),
    }
    corpus = []
    for name, samples in sources.items():
        with (root / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
            for number, messages in enumerate(samples, start=1):
                lines.write(json.dumps({"id": f"{name}-{number:04d}", "messages": messages}) + "\n")
                corpus += [message["content"] for message in messages if message["role"] == "assistant"]
                corpus += [message["content"][-1]["text"] for message in messages if message["role"] == "user"]
    write_tokenizer(root / "tokenizer", corpus)
    (root / "settings.json").write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")


def prepare(out: Path, settings: Settings) -> bool:
    """Makes the data at `out`, or finds it there. Returns whether it was made now.

    It is written beside `out` and renamed when whole. Raises FileExistsError when `out` holds something else.
    """
    try:
        found = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == asdict(settings):
        return False
    if found is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else; remove it or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        fresh = Path(folder) / "data"
        fresh.mkdir()
        write(fresh, settings)
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the data of the mixed example.")
    parser.add_argument("--out", type=Path, default=Path("runs/mixed/data"), help="folder to make")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of every random choice")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"argument --seed: must be at least 0, got {options.seed}")
    try:
        made = prepare(options.out, Settings(seed=options.seed))
    except FileExistsError as error:
        parser.error(f"argument --out: {error}")
    files = [path for path in options.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{'wrote' if made else 'found, nothing to do:'} {options.out}: {len(files)} files, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
