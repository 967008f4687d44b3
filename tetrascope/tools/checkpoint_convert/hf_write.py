"""Logical tensors as a Hugging Face folder that transformers loads, in any of the family's layouts."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.errors import UserError
from tetrascope.models.weights import CheckpointLayout, Piece, logical_tensors, relative
from tetrascope.tools.checkpoint_convert.formats import DTYPES, FILE_BYTES, Options, Output, Reader, Rows, Target
from tetrascope.tools.checkpoint_convert.safetensors_file import file_order, write_file

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"


class HFWriter:
    """`Writer` of a Hugging Face folder.

    What the source kept of the folder it came from is carried over: tokenizer, processor and generation files, in the
    same layout also config.json and which file holds which tensor. A source that kept nothing gets config.json,
    generation_config.json, preprocessor_config.json and the tokenizer written anew.

    Raises UserError for an unknown layout, and when tensors are missing.
    """

    def __init__(self, reader: Reader, options: Options) -> None:
        self._reader, self._options = reader, options
        self._kept = reader.companions()
        family = reader.family
        name = options.layout or next(iter(family.layouts))
        if name not in family.layouts:
            known = ", ".join(family.layouts)
            raise UserError(f"--layout: {family.name} has no layout {name!r}; choose one of {known}")
        self._layout: CheckpointLayout = family.layouts[name]
        self._same = self._kept.origin is not None and self._kept.origin.layout == name
        self._places = self._kept.origin.places if self._same and self._kept.origin and not options.file_bytes else {}
        self._converted = bool(options.dtype or (self._kept.origin and self._kept.origin.dtype))
        if not all(file.endswith(".safetensors") for file in self._places.values()):
            self._places = {}
        self.outputs: Sequence[Output] = [
            Output(path, _ordered(targets)) for path, targets in self._files(list(self._targets()))
        ]

    def _targets(self) -> Iterator[Target]:
        """All tensors to be written; those that the source lacks, as allowed, are left out."""
        reader, config = self._reader, self._reader.config
        weights = self._layout.weights(config)
        pieces = relative(weights, reader.family.weights(config))
        tensors = logical_tensors(weights)
        copies = self._layout.copies(config)
        stored = [copy for copy in copies if copy in self._places]
        missing: set[str] = set()
        for name in [*tensors, *stored]:
            original = copies.get(name, name)
            if lacking := {p.tensor.name for p in pieces[original]} - reader.tensors.keys():
                missing |= lacking
                continue
            dtype = _dtype(reader, pieces[original], self._options)
            yield Target(name, tensors[original].shape, dtype, tuple(pieces[original]))
        refused = sorted(n for n in missing - reader.absent if not _matches(n, self._options.allow))
        if refused:
            raise UserError(
                f"{reader.path}: lacks {len(refused)} tensors of the model ({', '.join(refused[:3])}, …); give a "
                "checkpoint of the whole model, or name what may be missing with --allow REGEX"
            )

    def _files(self, targets: list[Target]) -> Iterator[tuple[str, list[Target]]]:
        """Paths of the tensor files, with what goes into each: as the source had it, or by size."""
        if self._places:
            grouped: dict[str, list[Target]] = {}
            for target in targets:
                grouped.setdefault(self._places[target.name], []).append(target)
            yield from sorted(grouped.items())
            return
        folders: dict[str, list[Target]] = {}
        for target in targets:
            folders.setdefault(target.name.rpartition("/")[0], []).append(target)
        for folder, inside in folders.items():
            groups = list(by_size(inside, self._options.file_bytes or FILE_BYTES))
            for number, group in enumerate(groups, start=1):
                name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
                yield _join(folder, name), group

    def write(self, output: Output, folder: Path, rows: Rows) -> dict[str, Any]:
        """Writes a safetensors file."""
        path = folder / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [(target.name.rpartition("/")[2], target.dtype, target.shape) for target in output.targets]
        write_file(path, entries, (chunk for target in output.targets for chunk in rows.chunks(target)))
        return {}

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        """Writes indexes, configurations and what else belongs to the model."""
        for place, source in self._kept.files.items():
            if not place.endswith(INDEX):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / place)
        self._write_indexes(folder)
        self._write_configs(folder)
        language = folder / self._layout.language_folder
        if not self._kept.files:
            self._write_usual(folder, language)
        elif self._options.tokenizer is not None:
            load_tokenizer(self._options.tokenizer).save_pretrained(str(language))

    def _write_indexes(self, folder: Path) -> None:
        files: dict[str, list[Output]] = {}
        for output in self.outputs:
            files.setdefault(output.path.rpartition("/")[0], []).append(output)
        for place, outputs in files.items():
            names = {output.path.rpartition("/")[2] for output in outputs}
            if names == {SINGLE}:
                continue
            held = {
                target.name.rpartition("/")[2]: output.path.rpartition("/")[2]
                for output in outputs
                for target in output.targets
            }
            total = sum(output.nbytes for output in outputs)
            kept = self._kept.files.get(_join(place, INDEX)) if self._places and not self._converted else None
            if kept is not None and json.loads(kept.read_text(encoding="utf-8")).get("weight_map") == held:
                shutil.copyfile(kept, folder / _join(place, INDEX))
            else:
                _write_json(folder / place / INDEX, {"metadata": {"total_size": total}, "weight_map": held})

    def _write_configs(self, folder: Path) -> None:
        """config.json, and what else the layout has of that kind."""
        bytes_of: Counter[torch.dtype] = Counter()
        for output in self.outputs:
            for target in output.targets:
                bytes_of[target.dtype] += target.nbytes
        names = {dtype: name for name, dtype in DTYPES.items()}
        main = bytes_of.most_common(1)[0][0]
        dtype = names.get(main, str(main).removeprefix("torch."))
        for path, content in self._layout.configs(self._reader.config, dtype).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if not self._same or path not in self._kept.files:
                _write_json(folder / path, content)
                continue
            if self._converted:
                kept = json.loads(self._kept.files[path].read_text(encoding="utf-8"))
                _write_json(folder / path, with_dtype(kept, dtype))

    def _write_usual(self, folder: Path, language: Path) -> None:
        config, family = self._reader.config, self._reader.family
        _write_json(
            language / "generation_config.json",
            {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "do_sample": False},
        )
        tokenizer = self._options.tokenizer or self._kept.tokenizer
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(str(language))
        family.media(config, self._kept.media).save(str(folder))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _dtype(reader: Reader, pieces: Sequence[Piece], options: Options) -> torch.dtype:
    """What a tensor is written in: as asked for, or the widest of what it is made of."""
    if options.dtype is not None:
        return DTYPES[options.dtype]
    return reduce(torch.promote_types, {reader.dtype(piece.tensor.name) for piece in pieces})


def _ordered(targets: Iterable[Target]) -> tuple[Target, ...]:
    """Targets of one file in the order in which they lie in it."""
    by_name = {target.name.rpartition("/")[2]: target for target in targets}
    return tuple(by_name[name] for name, _, _ in file_order((n, t.dtype, t.shape) for n, t in by_name.items()))


def by_size(targets: Iterable[Target], limit: int) -> Iterator[list[Target]]:
    """Targets grouped into files of at most `limit` bytes, a larger one alone."""
    group: list[Target] = []
    size = 0
    for target in targets:
        if group and size + target.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(target)
        size += target.nbytes
    if group:
        yield group


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says that dtype wherever it says one, in its sections too."""

    def changed(key: str, value: Any) -> Any:
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            return dtype
        return with_dtype(value, dtype) if isinstance(value, dict) else value

    return {key: changed(key, value) for key, value in config.items()}


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
