"""How fast checkpoints are converted, beside how fast the same files are copied: a synthetic model, HF -> native -> HF.

    python -m tetrascope.tools.bench.convert --gigabytes 10

Every phase reads files that are not in the page cache and ends when what it wrote is on the disk. The copy, plain reads
and writes of large blocks, runs before and after the conversions, whose rate is given beside the mean of the two. Needs
three times the model's size on disk at the most. Exit code 1: the model that came back is another one.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, Qwen2VLDecoder, Qwen2VLVision
from tetrascope.models.weights import logical_tensors
from tetrascope.tools.checkpoint_convert.convert import convert, plan
from tetrascope.tools.checkpoint_convert.formats import Options
from tetrascope.tools.checkpoint_convert.safetensors_file import Entry, file_order, write_file

HIDDEN, INTERMEDIATE, VOCAB = 2048, 8192, 65536
SHARD = 10**9
"""Bytes of a file of the synthetic model."""

BLOCK = 16 << 20


@dataclass(frozen=True)
class Phase:
    """A conversion or a copy: bytes, seconds, processor seconds of all threads, peak resident memory of its process in
    bytes."""

    name: str
    nbytes: int
    seconds: float
    cpu: float
    peak: int

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


def make_config(gigabytes: float) -> Qwen2VLConfig:
    """A model with as many decoder layers as that many bytes take in bf16."""

    def config(layers: int) -> Qwen2VLConfig:
        decoder = Qwen2VLDecoder(
            hidden=HIDDEN, intermediate=INTERMEDIATE, layers=layers, heads=16, kv_heads=2, vocab=VOCAB
        )
        vision = Qwen2VLVision(width=64, layers=1, heads=2)
        tokens = {"eos_token_id": 4, "pad_token_id": 5}
        return replace(FAMILY.presets["2b"](), decoder=decoder, vision=vision, **tokens)

    sizes = [sum(_numbers(config(layers))) * 2 for layers in (1, 2)]
    return config(max(1, round(1 + (gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0]))))


def _numbers(config: Qwen2VLConfig) -> list[int]:
    tensors = logical_tensors(FAMILY.weights(config)).values()
    return [int(torch.Size(tensor.shape).numel()) for tensor in tensors]


def write_model(folder: Path, config: Qwen2VLConfig) -> int:
    """Writes a Hugging Face folder of random numbers in bf16. Returns its bytes."""
    folder.mkdir(parents=True)
    groups: list[list[Entry]] = [[]]
    size = 0
    for tensor in logical_tensors(FAMILY.weights(config)).values():
        nbytes = int(torch.Size(tensor.shape).numel()) * 2
        if size + nbytes > SHARD and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append((tensor.name, torch.bfloat16, tensor.shape))
        size += nbytes
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = file_order(group)
        write_file(folder / name, entries, (part for entry in entries for part in _random(entry, noise)))
        places.update({entry[0]: name for entry in entries})
    total = sum((folder / name).stat().st_size for name in set(places.values()))
    index = {"metadata": {"total_size": sum(_numbers(config)) * 2}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(FAMILY.to_hf(config, "bfloat16"), indent=2) + "\n")
    return total


def _random(entry: Entry, noise: Tensor) -> Iterator[Tensor]:
    """Numbers that differ from tensor to tensor."""
    left, start = int(torch.Size(entry[2]).numel()), sum(entry[0].encode()) * 997 % (len(noise) // 2)
    while left:
        part = noise[start : start + left]
        left -= len(part)
        start = (start * 31 + 7) % (len(noise) // 2)
        yield part


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, destination: Path) -> None:
    """Copies the files of a folder, each synced to the disk."""
    destination.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as read, (destination / path.name).open("wb", buffering=0) as write:
            while block := read.read(BLOCK):
                write.write(block)
            os.fsync(write.fileno())


def _work(job: tuple[str, Path, Path]) -> tuple[float, float, int]:
    """Runs one phase; returns its seconds, processor seconds, and the peak resident memory of this process."""
    name, source, destination = job
    began, cpu = time.perf_counter(), time.process_time()
    if name == "copy":
        copy(source, destination)
    else:
        convert(plan(source, name, Options(shards="tp2pp2" if name == "native" else "")), destination)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_phase(label: str, name: str, source: Path, destination: Path, nbytes: int) -> Phase:
    """Runs `copy`, or a conversion to the format `name`, in a fresh process with cold files."""
    forget(source)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return Phase(label, nbytes, *pool.apply(_work, ((name, source, destination),)))


def main() -> int:
    """Measures, prints a table, cleans up. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-convert-") as name:
        root = Path(name)
        config = make_config(arguments.gigabytes)
        nbytes = write_model(root / "hf", config)
        print(f"{nbytes / 1e9:.2f} GB in bf16, largest tensor {max(_numbers(config)) * 2 / 1e6:.0f} MB")
        phases = []
        for label in ("copy, before", "copy, after"):
            if label == "copy, after":
                phases.append(run_phase("HF -> native (tp2pp2)", "native", root / "hf", root / "native", nbytes))
                phases.append(run_phase("native -> HF", "hf", root / "native", root / "back", nbytes))
                files = [path.name for path in (root / "hf").iterdir()]
                _, different, missing = filecmp.cmpfiles(root / "hf", root / "back", files, shallow=False)
                shutil.rmtree(root / "native")
                shutil.rmtree(root / "back")
            print(f"{label} …", flush=True)
            phases.append(run_phase(label, "copy", root / "hf", root / "copy", nbytes))
            shutil.rmtree(root / "copy")
    base = 2 / (1 / phases[0].rate + 1 / phases[-1].rate)
    for phase in phases:
        print(
            f"{phase.name:24} {phase.seconds:7.1f} s {phase.rate / 1e6:7.0f} MB/s {phase.rate / base:6.0%} of a copy, "
            f"{phase.cpu:.1f} s of processors, peak memory {phase.peak / 1e6:,.0f} MB"
        )
    wrong = [*different, *missing]
    print(f"files differ: {', '.join(wrong)}" if wrong else "all files came back bit-equal")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
