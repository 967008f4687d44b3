"""Conversations with images and videos from a JSONL file.

One sample a line: {"id": …, "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
{"type": "text", "text": "…"}]}, {"role": "assistant", "content": "…"}]}, paths relative to the file. A video is
{"type": "video", "video": "a.mp4"}, or a list of pictures instead of a path, with their "fps".

Opening a data set reads headers and text only and finds what is wrong with them before training starts. Pixels are
decoded when a step needs them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tetrascope.engine.config import DataSection
from tetrascope.engine.data.files import BadMedia, MediaFile, MediaReader, media_files
from tetrascope.engine.plan import SampleInfo
from tetrascope.errors import UserError
from tetrascope.models.family import Chat, Family


@dataclass(frozen=True)
class Sample:
    """A tokenized sample: ids int64 `[T]`, supervised bool `[T]`, image and video files."""

    name: str
    ids_T: np.ndarray
    supervised_T: np.ndarray
    files: tuple[MediaFile, ...]
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
        self._chat: Chat = family.chats[options.chat or next(iter(family.chats))](config, tokenizer)
        self._reader = MediaReader(family.media(config, options), config.vision.patch, options.min_frames)
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
        try:
            files = tuple(media_files(raw["messages"], folder))
            media = self._reader.describe(files)
            ids, supervised = self._chat.encode(raw["messages"], media)
            self._family.positions(self._config, ids, media, (0, 0, 0))  # whether visual tokens and media agree
        except UserError as error:
            raise UserError(f"sample {name}: {error}") from error
        if len(ids) > self._options.max_tokens:
            raise UserError(
                f"sample {name}: {len(ids)} tokens, more than data.max_tokens={self._options.max_tokens}; "
                "raise the limit, lower data.max_pixels, or remove the sample"
            )
        # Every token but a document's first can be a target: it is predicted from the one before it.
        info = SampleInfo(len(ids), int(supervised[1:].sum()), media)
        return Sample(name, ids, supervised, files, info)

    def patches(self, number: int) -> list[np.ndarray]:
        """Patch rows float32 `[n, P]` of each image and video of a sample. Raises BadMedia for one that fails."""
        sample = self.samples[number]
        try:
            return [self._reader.rows(f, m) for f, m in zip(sample.files, sample.info.media, strict=True)]
        except BadMedia as error:
            raise BadMedia(f"sample {sample.name}: {error}") from error
