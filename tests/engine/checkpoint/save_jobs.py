"""What the ranks of the checkpoint tests do, by name."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.checkpoint import Saver, checkpoints, load_checkpoint, newest_whole, read_state, save_checkpoint
from tetrascope.engine.checkpoint import files as files_module
from tetrascope.engine.checkpoint.shards import state_shards
from tetrascope.engine.config import CheckpointSection, OptimizerSection, ParallelSection
from tetrascope.engine.config_file import load_config
from tetrascope.engine.logical import Shard
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Workload, make_pipeline
from tetrascope.engine.run import train
from tetrascope.engine.setup import prepare
from tetrascope.engine.trainer import Trainer
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.zero.optimizer import ZeroAdamW
from tetrascope.tools.verify.families import qwen2_vl

Options = dict[str, Any]
"""Keys of the section `parallel`."""


def build(options: Options) -> tuple[StageModel, ZeroAdamW]:
    """A small Qwen2-VL with tied embeddings, part of it frozen, in a layout."""
    parallel = ParallelSection(**options)
    tiny = qwen2_vl.tiny_config(tied=True, layers=6)
    decoder, vision = replace(tiny.decoder, kv_heads=4, vocab=252), replace(tiny.vision, heads=4)
    config = replace(tiny, decoder=decoder, vision=vision)
    family, settings = get_family("qwen2_vl"), OptimizerSection(lr=1e-3, modules={r"layers\.3\..*": {"frozen": True}})
    modules = family_modules(family, config, settings)
    mesh = Mesh(parallel.layout(dist.get_world_size()), "cpu")
    cut = make_pipeline(family, config, parallel, modules, Workload(4)).cut
    model = StageModel(family, config, mesh, cut, sdpa_attention, torch.float32, modules)
    return model, build_optimizer(model, settings, torch.device("cpu"))


def number(shard: Shard) -> Tensor:
    """What belongs in a shard: random numbers of the whole tensor, which follow from its name, cut."""
    seed = int.from_bytes(hashlib.sha256(shard.name.encode()).digest()[:7], "big")
    whole = torch.randn(shard.shape, generator=torch.Generator().manual_seed(seed))
    return whole[tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))]


def write(model: StageModel, optimizer: ZeroAdamW, value: Callable[[Shard], Tensor] = number) -> None:
    """Fills weights and moments."""
    for shard in state_shards(model, optimizer, owned_only=False):
        shard.tensor.copy_(value(shard))


def save_in_layout(folder: Path, options: Options) -> None:
    """Saves the state that `number` says, as step 7."""
    model, optimizer = build(options)
    optimizer.set_step(7)
    write(model, optimizer)
    save_checkpoint(folder, 7, model, optimizer, {})


def load_in_layout(folders: list[Path], options: Options) -> int:
    """Loads each of several and compares all of it, and the published parameters; how many numbers there are."""
    model, optimizer = build(options)
    count = 0
    for folder in folders:
        write(model, optimizer, lambda shard: torch.full(shard.tensor.shape, torch.nan))
        step, fresh = load_checkpoint(folder / "step-000007", model, optimizer)
        assert (step, optimizer.steps, fresh) == (7, 7, [])
        for shard in state_shards(model, optimizer, owned_only=False):
            assert torch.equal(shard.tensor, number(shard)), (folder.name, options, shard.name, shard.offset)
        for name, placed in model.placed.items():
            for shard in model.shards(name, 0, placed.param.detach().flatten()):
                assert torch.equal(shard.tensor, number(shard)), (folder.name, options, shard.name)
        count += sum(shard.tensor.numel() for shard in state_shards(model, optimizer, owned_only=True))
    return count


def constant(value: float) -> Callable[[Shard], Tensor]:
    """The same number everywhere."""
    return lambda shard: torch.full(shard.tensor.shape, value)


def change(optimizer: ZeroAdamW, value: float) -> None:
    """Fills what a step changes: the trained weights and their moments."""
    for group in optimizer.trained:
        for tensor in (group.values, *optimizer.state(group).values()):
            tensor.fill_(value)


def read_constant(folder: Path, step: int, model: StageModel, optimizer: ZeroAdamW) -> set[float]:
    """The different numbers that a checkpoint holds in this rank's layout."""
    load_checkpoint(folder / f"step-{step:06d}", model, optimizer)
    return {x for s in state_shards(model, optimizer, owned_only=False) for x in s.tensor.unique().tolist()}


def save_while_the_state_changes(folder: Path) -> tuple[str, set[float], set[float], float]:
    """A save that is held up in the middle while the state goes on; what was saved, then and in the next one."""
    model, optimizer = build({"dp": None})
    saver = Saver(folder, CheckpointSection())
    gate = threading.Event()
    real = files_module.ChecksumStream.write

    def held(stream: files_module.ChecksumStream, data: bytes) -> int:
        assert gate.wait(60)
        return real(stream, data)

    files_module.ChecksumStream.write = held  # type: ignore[method-assign]
    try:
        write(model, optimizer, constant(1.0))
        saver.save(1, model, optimizer, {})
        change(optimizer, 2.0)
        assert saver.busy and not list(folder.glob("step-*")), "the save has not been waited for"
        gate.set()
        before = saver.save(2, model, optimizer, {})  # waits for the first
        assert before is not None and before.checkpoint is not None
        change(optimizer, 3.0)
        outcome = saver.collect(last=True)
        assert outcome is not None
    finally:
        files_module.ChecksumStream.write = real  # type: ignore[method-assign]
        saver.close()
    numbers = [read_constant(folder, step, model, optimizer) for step in (1, 2)]
    return before.checkpoint.name, numbers[0], numbers[1], outcome.stalled


def fill_the_disk_of(rank: int, room: int = 50_000) -> Callable[[], None]:
    """From now on, files of one rank find no more room than so many bytes; returns what undoes that."""
    real = files_module.ChecksumStream.write
    left = [room if dist.get_rank() == rank else 1 << 60]

    def write_some(stream: files_module.ChecksumStream, data: bytes) -> int:
        left[0] -= memoryview(data).nbytes
        if left[0] < 0:
            stream.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise stream.error
        return real(stream, data)

    def undo() -> None:
        files_module.ChecksumStream.write = real  # type: ignore[method-assign]

    files_module.ChecksumStream.write = write_some  # type: ignore[method-assign]
    return undo


def save_to_a_full_disk(folder: Path, on_full_disk: str, asynchronous: bool) -> list[str]:
    """A save that goes well, one that one rank's disk has no room for, another that goes well; what is said of each."""
    model, optimizer = build({"dp": None})
    saver = Saver(folder, CheckpointSection(asynchronous=asynchronous, on_full_disk=on_full_disk))
    said = []
    for step in (1, 2, 3):
        undo = fill_the_disk_of(1) if step == 2 else lambda: None
        try:
            saver.save(step, model, optimizer, {})
            outcome = saver.collect(last=step == 3)
            said.append(outcome.report() if outcome else "")
        except UserError as error:
            said.append(f"raised {type(error).__name__}: {error}")
        finally:
            undo()
    saver.close()
    said.append(" ".join(sorted(path.name for path in folder.iterdir())))
    return said


def last_save_without_room(folder: Path) -> str:
    """What the last save of a run does when it finds no room, though the run would have gone on before."""
    model, optimizer = build({"dp": None})
    saver = Saver(folder, CheckpointSection(on_full_disk="continue"))
    undo = fill_the_disk_of(0)
    try:
        saver.save(1, model, optimizer, {})
        saver.collect(last=True)
    except UserError as error:
        return str(error)
    finally:
        undo()
        saver.close()
    return "nothing"


def find(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """What all ranks find to be the newest whole one."""
    saver = Saver(folder, CheckpointSection())
    found = newest_whole(folder, saver.ranks)
    saver.close()
    return found.checkpoint and found.checkpoint.name, found.passed_over


def run_to_the_end(config: Path, overrides: list[str], resume: bool, full: bool) -> tuple[list[int], list[str]]:
    """A whole run; the checkpoints it leaves, and what it made of each in the background. full: no room for a while."""
    made: list[str] = []
    setup = prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"]))
    undo = fill_the_disk_of(0) if full else lambda: None

    def after(checkpoint: Path) -> None:
        made.append(f"{read_state(checkpoint)['step']} {threading.current_thread().name.split('_')[0]}")

    try:
        train(setup, resume, after)
    finally:
        undo()
    return list(checkpoints(setup.config.output.dir / "checkpoints")), made


def resume_and_say(config: Path, overrides: list[str]) -> str:
    """What a resumed run says of where it goes on."""
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])))
    try:
        return trainer.start(resume=True)
    finally:
        trainer.close()


def interrupted_run(config: Path, overrides: list[str]) -> tuple[bool, str, list[int]]:
    """A run of which the last rank is interrupted during its second step; how it ends and what it leaves."""
    setup = prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"]))
    step = Trainer.step

    def interrupt(trainer: Trainer, stop: int | None) -> Any:
        if trainer.step_number == 1 and trainer.mesh.rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, stop)

    Trainer.step = interrupt  # type: ignore[method-assign]
    try:
        outcome = train(setup, False)
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    return outcome.interrupted, outcome.checkpoint.name, list(checkpoints(outcome.checkpoint.parent))
