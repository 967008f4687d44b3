"""Conversations with images from a JSONL file.

One sample a line: {"id": …, "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
{"type": "text", "text": "…"}]}, {"role": "assistant", "content": "…"}]}, image paths relative to the file.

Opening a data set reads headers and text only and finds what is wrong with them before training starts. Pixels are
decoded when a step needs them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tetrascope.engine.config import DataSection
from tetrascope.engine.plan import SampleInfo
from tetrascope.errors import UserError
from tetrascope.models.family import Chat, Family, ImageProcessor

BROKEN = (OSError, ValueError, SyntaxError)
"""What Pillow raises for files it cannot read; SyntaxError for some broken PNGs."""


class BadImage(Exception):
    """An image whose pixels cannot be decoded; the message names sample and file."""


@dataclass(frozen=True)
class Sample:
    """A tokenized sample: ids int64 `[T]`, supervised bool `[T]`, positions int64 `[axes, T]`, image files."""

    name: str
    ids_T: np.ndarray
    supervised_T: np.ndarray
    positions_3T: np.ndarray
    images: tuple[Path, ...]
    info: SampleInfo


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers loads it. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"data.tokenizer: {folder} is not a folder; give one that holds a Hugging Face tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: {folder} holds no tokenizer that transformers can load: {error}") from error


class Dataset:
    """All samples of a JSONL file, tokenized."""

    def __init__(self, options: DataSection, family: Family, config: Any, tokenizer: Any) -> None:
        self._family, self._config, self._options = family, config, options
        self._chat: Chat = family.chat(config, tokenizer)
        self._processor: ImageProcessor = family.image_processor(config, options.min_pixels, options.max_pixels)
        self._sizes: dict[Path, tuple[int, int]] = {}
        self.samples = self._read(options.train)

    def __len__(self) -> int:
        return len(self.samples)

    def _read(self, path: Path) -> list[Sample]:
        try:
            # Not splitlines: JSON strings may hold other line separators, such as U+2028.
            lines = path.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"data.train: {path} cannot be read ({error.strerror}); check the path") from error
        except UnicodeDecodeError as error:
            raise UserError(f"data.train: {path} is not UTF-8 ({error}); save it as UTF-8") from error
        samples = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error}); expected one sample a line") from error
            try:
                samples.append(self._sample(raw, f"line {number}", path.parent))
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from error
        if not samples:
            raise UserError(f"data.train: {path} holds no samples")
        return samples

    def _sample(self, raw: Any, fallback: str, folder: Path) -> Sample:
        if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
            raise UserError('expected an object with a list "messages"')
        name = str(raw.get("id", fallback))
        paths = [
            part.get("image")
            for message in raw["messages"]
            if isinstance(message, dict) and isinstance(message.get("content"), list)
            for part in message["content"]
            if isinstance(part, dict) and part.get("type") == "image"
        ]
        wrong = [path for path in paths if not isinstance(path, str) or not path]
        if wrong:
            raise UserError(f'sample {name}: "image" is {wrong[0]!r}; expected the path of a file')
        images = tuple(folder / str(path) for path in paths)
        try:
            grids = tuple(self._processor.grid(*self._size(image)) for image in images)
            merge = self._config.vision.merge
            counts = [t * h * w // merge**2 for t, h, w in grids]
            ids, supervised = self._chat.encode(raw["messages"], counts)
            positions = self._family.positions(self._config, ids, grids)
        except UserError as error:
            raise UserError(f"sample {name}: {error}") from error
        if len(ids) > self._options.max_tokens:
            raise UserError(
                f"sample {name}: {len(ids)} tokens, more than data.max_tokens={self._options.max_tokens}; "
                "raise the limit, lower data.max_pixels, or remove the sample"
            )
        # Every token but a document's first can be a target: it is predicted from the one before it.
        info = SampleInfo(len(ids), int(supervised[1:].sum()), grids)
        return Sample(name, ids, supervised, positions, images, info)

    def _size(self, path: Path) -> tuple[int, int]:
        """Width and height from the file's header, read once a file."""
        if path not in self._sizes:
            try:
                with Image.open(path) as image:
                    self._sizes[path] = image.size
            except FileNotFoundError as error:
                raise UserError(f"image {path} does not exist; fix the path or remove the sample") from error
            except (*BROKEN, Image.DecompressionBombError) as error:
                raise UserError(f"image {path} is not readable ({error}); replace it or remove the sample") from error
        return self._sizes[path]

    def patches(self, number: int) -> list[np.ndarray]:
        """Patch rows float32 `[t·h·w, P]` of each image of a sample. Raises BadImage when one cannot be decoded."""
        sample = self.samples[number]
        decoded = []
        for path, grid in zip(sample.images, sample.info.grids, strict=True):
            try:
                with Image.open(path) as image:
                    rows = self._processor.patches(image.convert("RGB"))
            except BROKEN as error:
                raise BadImage(f"sample {sample.name}: image {path}: {error}") from error
            if len(rows) != np.prod(grid):
                raise BadImage(f"sample {sample.name}: image {path} changed size since training began")
            decoded.append(rows)
        return decoded
