"""What a checkpoint format is: a reader and a writer of logical tensors.

Logical tensors are those of the family's canonical weight map: matrices or vectors with names and shapes that depend on
no format and no layout. A format reads them from a folder and writes them to one; that is all that converting between
any two formats needs. Both work by row ranges, so that no more than a part of one tensor is in memory at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tetrascope.errors import UserError
from tetrascope.models.family import Family
from tetrascope.models.media import DefaultMediaOptions, MediaOptions
from tetrascope.models.weights import HFTensor, Piece

FORMATS = {
    "hf": "tetrascope.tools.checkpoint_convert.hf",
    "native": "tetrascope.tools.checkpoint_convert.native",
    "megatron": "tetrascope.tools.checkpoint_convert.megatron",
}
"""Format name -> module that defines FORMAT, a `Format`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What tensors can be written in, by the names that config.json has for them."""


FILE_BYTES = 5 * 10**9
"""Size at which a new tensor file is begun, as on the hub."""


@dataclass(frozen=True)
class Options:
    """What a conversion was asked for.

    dtype: of the written tensors, a key of DTYPES; None: each stays as the source has it. layout: of the destination's
    names, None for the source's own or the family's first. shards: the parallel layout of the destination's shards,
    such as `tp2pp2`; empty: whole tensors. file_bytes: size at which a new tensor file is begun; None: as in the folder
    that the checkpoint comes from, or FILE_BYTES. allow: regular
    expressions of tensors of the source that may be unused, and of tensors that may be missing. config: a Hugging Face
    folder whose config.json describes the model, for a source that does not. tokenizer: its folder, where the source
    has none.
    """

    dtype: str | None = None
    layout: str | None = None
    shards: str = ""
    file_bytes: int | None = None
    allow: tuple[str, ...] = ()
    config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Origin:
    """The Hugging Face folder that a checkpoint is, or was made from: its layout, and which file held which tensor of
    that layout, copies of tied ones included. dtype: what all tensors were converted to since then, None: nothing."""

    layout: str
    places: Mapping[str, str]
    dtype: str | None = None


@dataclass(frozen=True)
class Companions:
    """What belongs to a model besides its tensors.

    files: those of a Hugging Face folder, place in it -> file; empty where none were kept. origin: None for a
    checkpoint that was not made from a Hugging Face folder. tokenizer: its folder, where it is not among the files.
    media: how images and videos become tokens.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    origin: Origin | None = None
    tokenizer: Path | None = None
    media: MediaOptions = field(default_factory=DefaultMediaOptions)


class Reader(Protocol):
    """A checkpoint as logical tensors. Its constructor reads names and headers only, and raises UserError for what is
    missing, unused (but for `Options.allow`), of another shape, or damaged."""

    @property
    def path(self) -> Path: ...
    @property
    def family(self) -> Family: ...
    @property
    def config(self) -> Any:
        """The family's configuration."""

    @property
    def tensors(self) -> Mapping[str, HFTensor]:
        """The logical tensors that the checkpoint holds: names and shapes of the canonical map. Not all of the model's,
        where only a part of it is there."""

    @property
    def absent(self) -> frozenset[str]:
        """Logical tensors of the model that are missing, as `Options.allow` allows."""

    @property
    def notes(self) -> Sequence[str]:
        """What is left out, and why, for the user: padding, buffers, optimizer state."""

    @property
    def drift(self) -> Mapping[str, float]:
        """Tensors of which several copies were read so far that differed -> largest difference to their mean."""

    def dtype(self, name: str) -> torch.dtype:
        """What a logical tensor is stored in."""

    def read(self, name: str, start: int, rows: int) -> Tensor:
        """Rows [start, start + rows) of a logical tensor as matrix or vector, in its own dtype, all columns.

        Called from several threads. Reads not much more than these rows. Raises UserError when they cannot be read.
        """

    def companions(self) -> Companions:
        """What belongs to the model besides its tensors."""


@dataclass(frozen=True)
class Target:
    """A tensor of the destination, or a shard of one: rows of logical tensors, stacked.

    name: as written. shape: of what is written. columns: which columns of these rows, None for all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    columns: range | None = None

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Output:
    """A file of the destination, the unit in which an interrupted conversion goes on."""

    path: str
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


class Rows(Protocol):
    """The contents of targets, read ahead in threads; what it gives counts as progress."""

    def chunks(self, target: Target) -> Iterator[Tensor]:
        """A target's rows, top to bottom, in its dtype: `[rows, columns]` or `[rows]`, contiguous."""

    def whole(self, target: Target) -> Tensor:
        """All of a target in its dtype and shape, in memory that nothing else holds."""


class Writer(Protocol):
    """Writes one conversion's destination. Its constructor reads no tensor; it raises UserError when the format cannot
    hold the model, or a tensor that it needs is missing."""

    @property
    def outputs(self) -> Sequence[Output]:
        """Files with tensors, in the order in which they are written."""

    def write(self, output: Output, folder: Path, rows: Rows) -> dict[str, Any]:
        """Writes one of `outputs` under its path in `folder` and syncs it to disk. Returns what `finish` must know of
        it, as JSON values."""

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        """Writes everything else, given the records of all outputs by path."""


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    recognise: whether a folder is (meant to be) such a checkpoint, by the files in it alone. open: raises UserError.
    writer: of a conversion from that reader.
    """

    name: str
    recognise: Callable[[Path], bool]
    open: Callable[[Path, Options], Reader]
    writer: Callable[[Reader, Options], Writer]
    signs: str = field(default="")
    """What `recognise` looks for, for messages."""


def get_format(name: str) -> Format:
    """The format called `name`. Raises UserError when there is none."""
    if name not in FORMATS:
        raise UserError(f"--to: unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    found: Format = importlib.import_module(FORMATS[name]).FORMAT
    return found


def recognise(folder: Path) -> Format:
    """The format of a folder. Raises UserError when it has none of them."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint folder")
    formats = [get_format(name) for name in FORMATS]
    for one in formats:
        if one.recognise(folder):
            return one
    signs = "; ".join(f"{one.name}: {one.signs}" for one in formats)
    raise UserError(f"{folder}: not a checkpoint that is known ({signs}); give the folder that holds these files")


def reduce_copies(copies: Sequence[Tensor]) -> tuple[Tensor, float]:
    """One tensor for several copies that ranks kept of it, and how far they had drifted apart.

    Equal copies give that tensor, bit by bit; others their mean, computed in float64 and rounded once. Returns it with
    the largest difference of an element of a copy to the mean.
    """
    first = copies[0]
    if all(torch.equal(first, other) for other in copies[1:]):
        return first, 0.0
    stacked = torch.stack([copy.double() for copy in copies])
    mean = stacked.mean(0)
    return mean.to(first.dtype), float((stacked - mean).abs().max())
