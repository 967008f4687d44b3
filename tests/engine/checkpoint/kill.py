"""Saves in a loop, in a process that is killed at a random moment, again and again; looks at what is left each time.

    python -m tests.engine.checkpoint.kill --kills 50

The oracle: before a save begins, the process says so on a pipe, and again when the save has returned. After the kill
the newest whole checkpoint must be one that was begun, no older than the last one that had returned, and every number
in it must be its own step's. A torn one that is accepted fails the second, a lost one the first. keep_last=2 is on, so
that deletion is interrupted as well. What SIGKILL cannot show is what a power cut would do to bytes that are in the
operating system's memory only; test_save.py checks the order of fsync and rename for that.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import signal
import struct
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import load

from tetrascope.engine.checkpoint import CheckpointReader, Ranks, newest_whole, tidy, write_snapshot
from tetrascope.engine.checkpoint.folders import prune
from tetrascope.engine.checkpoint.save import Snapshot
from tetrascope.engine.checkpoint.shards import ShardLoadPlanner
from tetrascope.engine.logical import Shard

ALONE = Ranks(None)
SHAPES = {"a": (64, 128), "b": (300,), "optimizer.exp_avg.a": (64, 128)}


def shards(value: float) -> list[Shard]:
    """A small state whose every number is `value`."""
    return [Shard(name, shape, (0,) * len(shape), torch.full(shape, value)) for name, shape in SHAPES.items()]


def read_back(checkpoint: Path) -> set[float]:
    """The different numbers that a checkpoint holds."""
    found = shards(-1.0)
    with warnings.catch_warnings():  # that there is no process group is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({}, storage_reader=CheckpointReader(checkpoint), planner=ShardLoadPlanner(found), no_dist=True)
    return {number for shard in found for number in shard.tensor.unique().tolist()}


def save_for_ever(folder: Path, step: int, pipe: int) -> None:
    """Saves step after step; tells the pipe (step, whether it is saved)."""
    tidy(folder)
    while True:
        step += 1
        os.write(pipe, struct.pack("ii", step, 0))
        write_snapshot(folder, Snapshot(step, shards(float(step)), {"format": 1, "step": step}), ALONE)
        os.write(pipe, struct.pack("ii", step, 1))
        prune(folder, step, 2, None)
        if step % 3 == 0:  # as after a resume from an older one: again under the same name
            write_snapshot(folder, Snapshot(step, shards(float(step)), {"format": 1, "step": step}), ALONE)


def kill_once(folder: Path, step: int, delay: float) -> tuple[int, int]:
    """Starts the loop at a step, kills it after `delay` seconds; the last steps (begun, saved)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(folder, step, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    begun = saved = step
    for number, done in struct.iter_unpack("ii", said):
        begun, saved = (begun, number) if done else (number, saved)
    return begun, saved


def moment_of_death(folder: Path, begun: int) -> str:
    """Where the kill struck, by what lies there."""
    names = {re.sub(r"\d", "", p.name) for p in folder.iterdir() if p.name.startswith(".")}
    for name, moment in ((".step-.old", "replacing"), (".step-.deleted", "deleting"), (".step-.partial", "writing")):
        if name in names:
            return moment
    return "named" if (folder / f"step-{begun:06d}").exists() else "beginning"


def run(kills: int, seed: int = 0) -> dict[str, object]:
    """Kills so often; returns how often at which moment. Raises AssertionError at the first checkpoint lost or torn."""
    draw = random.Random(seed)
    moments: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_snapshot(folder, Snapshot(0, shards(0.0), {"format": 1, "step": 0}), ALONE)
        started = time.monotonic()
        write_snapshot(folder, Snapshot(1, shards(1.0), {"format": 1, "step": 1}), ALONE)
        one = time.monotonic() - started
        step = 1
        for _ in range(kills):
            begun, saved = kill_once(folder, step, draw.uniform(0, 8 * one))
            moments[moment_of_death(folder, begun)] += 1
            tidy(folder)
            found = newest_whole(folder, ALONE)
            assert found.checkpoint is not None and not found.passed_over, (found, begun, saved)
            step = int(found.checkpoint.name.removeprefix("step-"))
            assert saved <= step <= begun, (found, begun, saved)
            assert read_back(found.checkpoint) == {float(step)}, found
    return {"kills": kills, "checkpoints": step, "moments": dict(moments), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a saving process at random moments.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(options.kills, options.seed)))
