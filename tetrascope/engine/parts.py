"""Starting a model from separate checkpoints: a language model here, a vision encoder there, the rest at random.

A language model's vocabulary need not have the model's size. Tokens that it does not know, such as those for images,
start at the mean of the rows that it has, as in transformers (`resize_token_embeddings`, without the noise) and in
InternVL. Rows beyond the model's vocabulary are left out where the folder's own tokenizer shows that they are padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tetrascope.engine.config import PartName
from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.engine.logical import Shard
from tetrascope.engine.source import HuggingFaceFolder, Source, read_hf_config
from tetrascope.errors import UserError
from tetrascope.models.family import Family
from tetrascope.models.layers.parts import Part
from tetrascope.models.weights import HFTensor, WeightMap

MEAN_ROWS = 1024
"""Rows that are read at once for a mean: 32 MiB at a width of 4,096 in double precision."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them is there where there is a tokenizer."""


class PartFolder(HuggingFaceFolder):
    """A checkpoint of one part of a model, read lazily.

    Raises UserError when its config.json does not fit the model, and as HuggingFaceFolder does.
    """

    def __init__(self, name: str, folder: Path, part: Part, model: WeightMap, config: object) -> None:
        self.name, self._part = name, part
        self._mean = cache(self._compute_mean)
        _check_settings(part, folder, f"model.init_from.{name}", config)
        super().__init__(folder, part.layouts, config, f"model.init_from.{name}", model)

    def check(self) -> None:
        """Raises UserError unless shapes and vocabulary fit the model. Reads headers only."""
        super().check()
        rows = {name: self._rows(name) for name in self._part.vocabulary & set(self.files.names())}
        if len(set(rows.values())) > 1:
            sizes = " and ".join(f"{name} {count}" for name, count in sorted(rows.items()))
            raise UserError(f"{self.field}: {self.folder}: rows for tokens: {sizes}; both must have as many")
        for name, count in rows.items():
            wanted = self._tensors[name].shape[0] if name in self._tensors else count
            if count > wanted:
                self._check_padding(count, wanted)

    def _check_padding(self, held: int, wanted: int) -> None:
        """Raises UserError unless the rows [wanted, held) belong to no token of the folder's own tokenizer."""
        text = f"{self.field}: {self.folder} has rows for {held} tokens, the model's vocabulary has {wanted}"
        remedy = f"set model.config.decoder.vocab={held}"
        if not any((self.folder / file).exists() for file in TOKENIZER_FILES):
            raise UserError(f"{text}; {remedy}, or add its tokenizer's files, to show that the rest is padding")
        try:
            tokens = len(load_tokenizer(self.folder))
        except UserError as error:
            raise UserError(f"{text}; {remedy}: whether the rest is padding is unknown ({error})") from error
        if tokens > wanted:
            raise UserError(f"{text}, but its tokenizer {tokens}; {remedy}")

    def _rows(self, name: str) -> int:
        return self.files.shape(name)[0]

    def _check_shape(self, tensor: HFTensor) -> None:
        if tensor.name in self._part.vocabulary and len(shape := self.files.shape(tensor.name)) == len(tensor.shape):
            tensor = HFTensor(tensor.name, (shape[0], *tensor.shape[1:]))
        super()._check_shape(tensor)

    def _read_tensor(self, tensor: HFTensor, place: tuple[slice, ...]) -> Tensor:
        held = self._rows(tensor.name)
        if tensor.name not in self._part.vocabulary or place[0].stop <= held:
            return super()._read_tensor(tensor, place)
        first = max(place[0].start, held)
        new = self._mean(tensor.name)[place[1]].expand(place[0].stop - first, -1)
        if first > place[0].start:
            return torch.cat([super()._read_tensor(tensor, (slice(place[0].start, first), place[1])), new])
        return new

    def _compute_mean(self, name: str) -> Tensor:
        """Mean of a tensor's rows, float32: always over whole rows in the same order, so that it has the same bits on
        every rank and in every layout."""
        rows = self._rows(name)
        total = torch.zeros(self.files.shape(name)[1], dtype=torch.float64)
        for start in range(0, rows, MEAN_ROWS):
            total += self.files.read(name, (slice(start, min(start + MEAN_ROWS, rows)),)).double().sum(0)
        return (total / rows).float()

    def __str__(self) -> str:
        """Which part comes from where, and what becomes of its vocabulary."""
        note = ""
        for name in sorted(self._part.vocabulary & self._tensors.keys())[:1]:
            held, wanted = self._rows(name), self._tensors[name].shape[0]
            if held < wanted:
                note = f" ({wanted - held} new tokens after {held}, at the mean of these)"
            elif held > wanted:
                note = f" (without {held - wanted} rows of padding after {wanted} tokens)"
        return f"{self.name} from {self.folder}{note}"


def _check_settings(part: Part, folder: Path, field: str, config: object) -> None:
    """Raises UserError unless the folder's config.json says what the model's configuration does."""
    if part.settings is None:
        return
    try:
        settings = part.settings(config, read_hf_config(folder))
    except UserError as error:
        raise UserError(f"{field}: {folder}: {error}") from error
    if wrong := [setting for setting in settings if setting.ours != setting.theirs]:
        theirs = ", ".join(f"{setting.key} {setting.theirs!r}" for setting in wrong)
        ours = ", ".join(f"{setting.field} {setting.ours!r}" for setting in wrong)
        raise UserError(
            f"{field}: {folder / 'config.json'} says {theirs}, model.preset and model.config say {ours}; "
            "change model.config or give another folder"
        )


class PartsSource:
    """First weights of a model out of checkpoints of its parts; what none of them has comes from `rest`."""

    def __init__(self, folders: Sequence[PartFolder], model: WeightMap, rest: Source) -> None:
        self._folders, self._rest = folders, rest
        self._owners = {name: folder for folder in folders for name in folder.logical}
        self._missing = [
            parameter
            for parameter, pieces in model.items()
            if not {p.tensor.name for p in pieces} & self._owners.keys()
        ]
        self._modules = {parameter.partition(".")[0] for parameter in model.keys() - set(self._missing)}

    def __call__(self, shard: Shard) -> Tensor:
        """The numbers of a shard of a logical tensor."""
        return self._owners.get(shard.name, self._rest)(shard)

    def __str__(self) -> str:
        """Where each part comes from, and what starts at random: modules, or parameters of one that has a source."""
        names = ((parameter.partition(".")[0], parameter) for parameter in self._missing)
        missing = dict.fromkeys(parameter if module in self._modules else module for module, parameter in names)
        found = [str(folder) for folder in self._folders] + [f"{', '.join(missing)} at random"] * bool(missing)
        return ", ".join(found)


def open_parts(paths: Mapping[PartName, Path], family: Family, config: object) -> list[PartFolder]:
    """The folders of `model.init_from`, by part. Raises UserError for a part that the family does not take."""
    for name in paths:
        if name not in family.parts:
            raise UserError(
                f"model.init_from.{name}: {family.name} cannot start its {name} from a checkpoint of its own; "
                f"it takes {', '.join(family.parts) or 'one folder for the whole model'}"
            )
    model = family.weights(config)
    return [PartFolder(name, path, family.parts[name], model, config) for name, path in paths.items()]
