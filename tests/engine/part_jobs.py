"""What the ranks of test_parts.py do, by name."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from tetrascope.engine.config_file import load_config
from tetrascope.engine.logical import Shard
from tetrascope.engine.setup import prepare
from tetrascope.engine.trainer import Trainer

Cut = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def started(config: Path, overrides: list[str]) -> tuple[str, list[Cut]]:
    """What a new run says of its start, and the shards of this rank's share: (name, shape, offset, numbers)."""
    trainer = Trainer(prepare(load_config(config, overrides), int(os.environ["WORLD_SIZE"])))
    line = trainer.start(resume=False)
    held: list[Shard] = []
    for group in trainer.optimizer.groups:
        held += [shard for _, shard in trainer.model.flat_shards(group, group.values)]
    trainer.close()
    return line, [(shard.name, shard.shape, shard.offset, shard.tensor.detach().clone()) for shard in held]
