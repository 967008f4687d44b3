"""A checkpoint in memory, as the source of conversions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrascope.models.family import Family
from tetrascope.models.weights import HFTensor, logical_tensors
from tetrascope.tools.checkpoint_convert.formats import Companions, Options, Reader
from tetrascope.tools.checkpoint_convert.megatron import FORMAT
from tetrascope.tools.checkpoint_convert.stream import RowStream


class Memory:
    """`Reader` of logical tensors in memory."""

    def __init__(self, family: Family, config: Any, weights: Mapping[str, Tensor]) -> None:
        self.path, self.family, self.config = Path("memory"), family, config
        self.tensors: Mapping[str, HFTensor] = {
            name: tensor for name, tensor in logical_tensors(family.weights(config)).items() if name in weights
        }
        self.absent = frozenset[str]()
        self.notes: Sequence[str] = ()
        self.drift: Mapping[str, float] = {}
        self._weights = {name: weights[name].reshape(tensor.matrix) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name].dtype

    def read(self, name: str, start: int, rows: int) -> Tensor:
        return self._weights[name][start : start + rows]

    def companions(self) -> Companions:
        return Companions()


def write_megatron(source: Reader, folder: Path, options: Options | None = None) -> Path:
    """A Megatron folder of a source; returns the checkpoint in it."""
    writer = FORMAT.writer(source, options or Options())
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        records = {
            output.path: writer.write(output, folder, RowStream(output, source, pool, lambda _: None))
            for output in writer.outputs
        }
    writer.finish(folder, records)
    return folder / "release"


def read_all(reader: Reader) -> dict[str, Tensor]:
    """All logical tensors of a reader, as matrices and vectors."""
    return {name: reader.read(name, 0, tensor.matrix[0]) for name, tensor in reader.tensors.items()}


def assert_holds(reader: Reader, source: Reader) -> None:
    """A reader has the tensors of a source and no others, bit by bit."""
    assert reader.tensors == source.tensors
    for name, tensor in read_all(reader).items():
        wanted = source.read(name, 0, source.tensors[name].matrix[0])
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
