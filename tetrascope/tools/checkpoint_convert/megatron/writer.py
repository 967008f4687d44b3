"""Logical tensors as a Megatron-Core checkpoint of format torch_dist, in a folder that Megatron's --load takes.

DST/latest_checkpointed_iteration.txt     release
DST/release/__0_0.distcp …                tensors, a chunk for each layer
DST/release/.metadata                     where each chunk lies (torch.distributed.checkpoint)
DST/release/common.pt, metadata.json      Megatron's arguments; the format
DST/release/tetrascope.json, hf/          what the model is; files of the Hugging Face folder that it comes from
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from tetrascope.errors import UserError
from tetrascope.models.weights import HFTensor, WeightMap, logical_tensors, relative, rows_of
from tetrascope.tools.checkpoint_convert.formats import DTYPES, FILE_BYTES, Options, Output, Reader, Rows, Target
from tetrascope.tools.checkpoint_convert.megatron.arguments import padded, to_arguments
from tetrascope.tools.checkpoint_convert.megatron.causal_lm import CausalLMConfig
from tetrascope.tools.checkpoint_convert.megatron.mapping import (
    LANGUAGE,
    PROJECTION,
    STATEFUL,
    VISION,
    VOCABULARY,
    Naming,
)
from tetrascope.tools.checkpoint_convert.megatron.model import WHOLE_MODELS, Names, language_map, megatron_weights
from tetrascope.tools.checkpoint_convert.megatron.reader import BACKEND, COMMON, DESCRIPTION, HF_FILES, RELEASE, TRACKER
from tetrascope.tools.checkpoint_convert.megatron.torch_dist import DcpFile, write_contents
from tetrascope.tools.checkpoint_convert.shards import parse_shards

FORMAT_VERSION = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True)
class _Place:
    """Where a target belongs in a tensor: whole shape (of a table of the vocabulary with its padding) and offset."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class MegatronWriter:
    """`Writer` of such a checkpoint.

    A family that Megatron-Core has as a whole is written as its LLaVAModel, any other, where `options.allow` names the
    tensors of encoder and adaptor, as the GPTModel that its language model is. `options.shards`: only the degree of
    tensor parallelism counts, by which the vocabulary is padded; Megatron-Core loads the folder in any layout.

    Raises UserError when tensors are missing, for an unknown layout or `shards`, and when encoder and adaptor have no
    place and are not allowed to go.
    """

    def __init__(self, reader: Reader, options: Options) -> None:
        self._reader, self._options = reader, options
        self._tp = parse_shards(options.shards)[0]
        if options.layout not in (None, *LAYOUTS):
            raise UserError(f"--layout: megatron has no layout {options.layout!r}; choose one of {', '.join(LAYOUTS)}")
        self._names = self._choose(LAYOUTS[options.layout or next(iter(LAYOUTS))])
        family, config = reader.family, reader.config
        own = megatron_weights(family, config, self._names)
        canonical = family.weights(config) if self._names.whole else language_map(family, config)
        self._places: dict[str, _Place] = {}
        self.outputs: Sequence[Output] = list(self._files(self._targets(own, canonical)))

    def _choose(self, spelling: Naming) -> Names:
        """A whole LLaVAModel, or the language model alone."""
        reader = self._reader
        rest = sorted(
            logical_tensors(reader.family.weights(reader.config)).keys()
            - logical_tensors(language_map(reader.family, reader.config)).keys()
        )
        dropped = [name for name in rest if name not in reader.tensors or self._allowed(name)]
        if len(dropped) == len(rest):
            return Names(False, Naming(), spelling)
        if reader.family.name in WHOLE_MODELS:
            return Names(True, Naming(), spelling)
        kept = [name for name in rest if name not in dropped]
        beginnings = sorted({re.escape(_beginning(name)) for name in rest})
        raise UserError(
            f"--to megatron: Megatron-Core has no model with the encoder and adaptor of {reader.family.name} "
            f"({len(kept)} tensors, such as {kept[0]}); write its language model alone, a GPTModel, with "
            + " ".join(f"--allow '{beginning}.*'" for beginning in beginnings)
        )

    def _allowed(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self._options.allow)

    def _targets(self, own: WeightMap, canonical: WeightMap) -> Iterator[Target]:
        reader = self._reader
        sources = relative(own, canonical)
        lacking = sorted({p.tensor.name for ps in sources.values() for p in ps} - reader.tensors.keys())
        if refused := [name for name in lacking if not self._allowed(name)]:
            raise UserError(
                f"{reader.path}: lacks {len(refused)} tensors of the model (such as {refused[0]}); give a checkpoint "
                "of the whole model"
            )
        for tensor in logical_tensors(own).values():
            pieces = sources[tensor.name]
            if any(piece.tensor.name in lacking for piece in pieces):
                continue
            dtype = reduce(torch.promote_types, {reader.dtype(piece.tensor.name) for piece in pieces})
            dtype = DTYPES[self._options.dtype] if self._options.dtype else dtype
            for target, place, start in self._chunks(tensor):
                rows = tensor.matrix[0] * place[0] // tensor.shape[0]
                self._places[target] = _Place(tensor.name, self._saved_shape(tensor), start)
                row = tensor.matrix[0] * start[0] // tensor.shape[0]
                yield Target(target, place, dtype, rows_of(pieces, row, rows))

    @staticmethod
    def _chunks(tensor: HFTensor) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """The chunks that a tensor is written in, one a layer: name of the target, shape, offset."""
        rest = (0,) * (len(tensor.shape) - 1)
        if ".layers." not in tensor.name or tensor.view is None:
            yield tensor.name, tensor.shape, (0, *rest)
            return
        for layer in range(tensor.shape[0]):
            yield f"{tensor.name}[{layer}]", (1, *tensor.shape[1:]), (layer, *rest)

    def _saved_shape(self, tensor: HFTensor) -> tuple[int, ...]:
        if VOCABULARY.fullmatch(tensor.name):
            return padded(tensor.shape[0], self._tp), *tensor.shape[1:]
        return tensor.shape

    def _files(self, targets: Iterator[Target]) -> Iterator[Output]:
        limit = self._options.file_bytes or FILE_BYTES
        group: list[Target] = []
        number = 0
        for target in targets:
            if group and sum(one.nbytes for one in group) + target.nbytes > limit:
                yield Output(f"{RELEASE}/__0_{number}.distcp", tuple(group))
                group, number = [], number + 1
            group.append(target)
        yield Output(f"{RELEASE}/__0_{number}.distcp", tuple(group))

    def write(self, output: Output, folder: Path, rows: Rows) -> dict[str, Any]:
        """Writes one `.distcp` file."""
        path = folder / output.path
        path.parent.mkdir(parents=True, exist_ok=True)
        file = DcpFile(path)
        for target in output.targets:
            place = self._places[target.name]
            file.add(place.name, place.shape, place.offset, rows.whole(target))
            if missing := place.shape[0] - target.shape[0] if VOCABULARY.fullmatch(place.name) else 0:
                padding = torch.zeros((missing, *target.shape[1:]), dtype=target.dtype)
                file.add(place.name, place.shape, (target.shape[0], *place.offset[1:]), padding)
        return {"chunks": file.close()}

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        """Writes the list of contents, Megatron's arguments and the description of the model."""
        reader, release = self._reader, folder / RELEASE
        states = DcpFile(release / f"__0_{len(self.outputs)}.distcp")
        for name in self._states():
            states.add_object(name, [None])
        chunks = [chunk for output in self.outputs for chunk in records[output.path]["chunks"]]
        write_contents(release, [*chunks, *states.close()])
        shape = reader.config.decoder
        dtype = next(target.dtype for output in self.outputs for target in output.targets)
        positions = reader.config.positions if isinstance(reader.config, CausalLMConfig) else None
        arguments = to_arguments(shape, padded(shape.vocab, self._tp), dtype, positions)
        torch.save({"checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "args": arguments}, release / COMMON)
        (release / BACKEND).write_text(json.dumps(FORMAT_VERSION))
        kept = reader.companions()
        for place, source in kept.files.items():
            (release / HF_FILES / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, release / HF_FILES / place)
        description = {
            "family": reader.family.name,
            "model": dataclasses.asdict(reader.config),
            "origin": dataclasses.asdict(kept.origin) if kept.origin else None,
        }
        (release / DESCRIPTION).write_text(json.dumps(description, indent=1))
        (folder / TRACKER).write_text(RELEASE)

    def _states(self) -> Iterator[str]:
        """Keys of the linears' states (see mapping.EXTRA_STATE), which strict loading wants."""
        blocks = {(LANGUAGE if self._names.whole else ""): self._reader.config.decoder.layers}
        if self._names.whole:
            blocks[VISION] = self._reader.config.vision.used
            yield from (f"{PROJECTION}{linear}._extra_state/shard_0_1" for linear in ("linear_fc1", "linear_fc2"))
        for prefix, layers in blocks.items():
            for module in STATEFUL:
                for layer in range(layers):
                    yield f"{prefix}decoder.layers.{module}._extra_state/shard_{layer}_{layers}"


LAYOUTS = {"transformer-engine": Naming(), "local": Naming(separate_norms=True)}
"""How the vision encoder's norms are called, by the layer spec that the run uses: see `Naming`."""


def _beginning(name: str) -> str:
    """The first parts of a tensor's name: two where all tensors share the first one."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" else 1]) + ("." if len(parts) > 1 else "")
