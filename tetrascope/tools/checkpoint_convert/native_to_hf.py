"""Native checkpoint -> Hugging Face folder that transformers loads.

Works from the files alone, in one process and without a process group, a file's worth of tensors at a time.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from tetrascope.engine.checkpoint import read_state
from tetrascope.engine.config import Config, validated
from tetrascope.engine.data.dataset import load_tokenizer
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.models.weights import HFTensor

FILE_BYTES = 5 * 10**9
"""Size at which a new safetensors file is begun, as on the hub."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_destination(destination: Path) -> None:
    """Raises UserError when the folder holds something other than a Hugging Face checkpoint to replace."""
    if destination.exists() and not (destination.is_dir() and (destination / "config.json").exists()):
        raise UserError(f"{destination}: exists and is no Hugging Face folder; choose another destination")


def native_to_hf(checkpoint: Path, destination: Path, dtype: str, tokenizer: Path | None = None) -> None:
    """Writes config.json, safetensors, generation config, tokenizer and preprocessor files to `destination`.

    dtype: of the written tensors, one of DTYPES. tokenizer: its folder, where it is no longer where the run had it.
    The folder gets its final name when it is complete; an older one is replaced. Raises UserError for a folder that is
    no checkpoint, or a destination that is no Hugging Face folder.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype: unknown {dtype!r}; choose one of {', '.join(DTYPES)}")
    state = read_state(checkpoint)
    config: Config = validated(Config, state["config"], str(checkpoint))
    family = get_family(state["family"])
    model = validated(family.config_class, state["model"], str(checkpoint))
    check_destination(destination)
    temporary = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {piece.name: piece for pieces in family.weights(model).values() for piece in pieces}
    _write_tensors(checkpoint, temporary, list(tensors.values()), DTYPES[dtype])
    hf_config = family.to_hf(model, dtype)
    _write_json(temporary / "config.json", hf_config)
    _write_json(
        temporary / "generation_config.json",
        {"eos_token_id": model.eos_token_id, "pad_token_id": model.pad_token_id, "do_sample": False},
    )
    load_tokenizer(tokenizer or config.data.tokenizer).save_pretrained(str(temporary))
    family.image_processor(model, config.data.min_pixels, config.data.max_pixels).save(str(temporary))
    shutil.rmtree(destination, ignore_errors=True)
    temporary.rename(destination)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_tensors(checkpoint: Path, folder: Path, tensors: list[HFTensor], dtype: torch.dtype) -> None:
    files = list(_files(tensors, dtype.itemsize))
    where: dict[str, str] = {}
    total = 0
    for number, group in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        loaded = {tensor.name: torch.empty(tensor.matrix) for tensor in group}
        with warnings.catch_warnings():  # that there is no process group is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(loaded), storage_reader=FileSystemReader(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)
        written = {tensor.name: loaded[tensor.name].view(tensor.shape).to(dtype) for tensor in group}
        save_file(written, str(folder / name), metadata={"format": "pt"})
        where.update(dict.fromkeys(written, name))
        total += sum(tensor.nbytes for tensor in written.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


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
