"""Native checkpoint -> Hugging Face folder that transformers loads.

Works from the files alone, in one process and without a process group, a file's worth of tensors at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from tetrascope.engine.checkpoint import read_state
from tetrascope.engine.config import Config, validated
from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.models.weights import HFTensor, Piece, WeightMap, logical_tensors, relative

FILE_BYTES = 5 * 10**9
"""Size at which a new safetensors file is begun, as on the hub."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_destination(destination: Path) -> None:
    """Raises UserError when the folder holds something other than a Hugging Face checkpoint to replace."""
    if destination.exists() and not (destination.is_dir() and (destination / "config.json").exists()):
        raise UserError(f"{destination}: exists and is no Hugging Face folder; choose another destination")


def native_to_hf(
    checkpoint: Path, destination: Path, dtype: str, tokenizer: Path | None = None, layout: str | None = None
) -> None:
    """Writes config.json, safetensors, generation config, tokenizer and preprocessor files to `destination`.

    dtype: of the written tensors, one of DTYPES. tokenizer: its folder, where it is no longer where the run had it.
    layout: how tensors are named and arranged, one of the family's layouts; the canonical one when not given.
    The folder gets its final name when it is complete; an older one is replaced. Raises UserError for a folder that is
    no checkpoint, or a destination that is no Hugging Face folder.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype: unknown {dtype!r}; choose one of {', '.join(DTYPES)}")
    state = read_state(checkpoint)
    config: Config = validated(Config, state["config"], str(checkpoint))
    family = get_family(state["family"])
    model = validated(family.config_class, state["model"], str(checkpoint))
    name = layout if layout is not None else next(iter(family.layouts))
    if name not in family.layouts:
        raise UserError(f"--layout: {family.name} has no layout {name!r}; choose one of {', '.join(family.layouts)}")
    check_destination(destination)
    temporary = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    chosen = family.layouts[name]
    _write_tensors(checkpoint, temporary, chosen.weights(model), family.weights(model), DTYPES[dtype])
    for path, content in chosen.configs(model, dtype).items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        _write_json(temporary / path, content)
    language = temporary / chosen.language_folder
    _write_json(
        language / "generation_config.json",
        {"eos_token_id": model.eos_token_id, "pad_token_id": model.pad_token_id, "do_sample": False},
    )
    load_tokenizer(tokenizer or config.data.tokenizer).save_pretrained(str(language))
    family.media(model, config.data).save(str(temporary))
    shutil.rmtree(destination, ignore_errors=True)
    temporary.rename(destination)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_tensors(
    checkpoint: Path, destination: Path, weights: WeightMap, canonical: WeightMap, dtype: torch.dtype
) -> None:
    """Writes the tensors of the map `weights`, each folder that their names speak of with files of its own."""
    sources = relative(weights, canonical)
    folders: dict[str, list[HFTensor]] = {}
    for tensor in logical_tensors(weights).values():
        folders.setdefault(tensor.name.rpartition("/")[0], []).append(tensor)
    for folder, tensors in folders.items():
        (destination / folder).mkdir(parents=True, exist_ok=True)
        _write_folder(checkpoint, destination / folder, tensors, sources, dtype)


def _write_folder(
    checkpoint: Path, folder: Path, tensors: list[HFTensor], sources: WeightMap, dtype: torch.dtype
) -> None:
    files = list(_files(tensors, dtype.itemsize))
    where: dict[str, str] = {}
    total = 0
    for number, group in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        written = _assembled(checkpoint, group, sources, dtype)
        save_file(written, str(folder / name), metadata={"format": "pt"})
        where.update(dict.fromkeys(written, name))
        total += sum(tensor.nbytes for tensor in written.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _assembled(checkpoint: Path, tensors: list[HFTensor], sources: WeightMap, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by their names in the file, put together from the logical tensors that hold their rows."""
    needed = logical_tensors({tensor.name: sources[tensor.name] for tensor in tensors})
    loaded = {name: torch.empty(tensor.matrix) for name, tensor in needed.items()}
    with warnings.catch_warnings():  # that there is no process group is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(dict(loaded), storage_reader=FileSystemReader(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)
        except (CheckpointException, OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise UserError(f"{checkpoint}: damaged ({_cause(error)}); convert another checkpoint") from error
    return {
        tensor.name.rpartition("/")[2]: _stack(sources[tensor.name], loaded).reshape(tensor.shape).to(dtype)
        for tensor in tensors
    }


def _cause(error: BaseException) -> str:
    """What went wrong, without the traceback that torch's own exception carries."""
    return repr(next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error)


def _stack(pieces: Sequence[Piece], loaded: Mapping[str, Tensor]) -> Tensor:
    parts = [loaded[p.tensor.name][p.start : p.start + p.rows] for p in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _files(tensors: Iterable[HFTensor], itemsize: int) -> Iterator[list[HFTensor]]:
    """Tensors grouped into files of at most FILE_BYTES, a larger tensor alone."""
    group: list[HFTensor] = []
    size = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * itemsize
        if group and size + nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += nbytes
    if group:
        yield group
