"""Saved in one layout, loaded in another.

The oracle is a function of a tensor's name (save_jobs.number): every number of every weight and moment, wherever it
lies, must be that of its place in the whole tensor. Random numbers, so that a shard in the wrong place shows; memory is
filled with NaN before each load, so that one that is not read shows as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoint.save_jobs import load_in_layout, save_in_layout
from tests.engine.train_jobs import run_steps
from tests.tiny import write_config
from tetrascope.tools.verify.pool import WorkerPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "pp3": (3, {"pp": 3}),
    "pp2, cut after the first layer": (2, {"pp": 2, "split": [1, 5]}),
    "dp3": (3, {"dp": 3}),
    "tp2 pp2 dp2": (8, {"tp": 2, "pp": 2, "dp": 2}),
    "pp2 in six chunks, dp2": (4, {"pp": 2, "dp": 2, "schedule": "interleaved", "virtual_stages": 3}),
    "ring2 ulysses2": (4, {"ring": 2, "ulysses": 2}),
    "ring2 pp2, a fold": (4, {"ring": 2, "pp": 2, "schedule": "cost", "placement": "fold"}),
}
"""Ranks and options."""


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same state, saved in each layout."""
    root = tmp_path_factory.mktemp("layouts")
    folders = []
    for number, (world, options) in enumerate(LAYOUTS.values()):
        pool.run(save_in_layout, root / str(number), options, world=world)
        folders.append(root / str(number))
    return folders


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_any_layout_saved_any_other_loads(pool: WorkerPool, saved: list[Path], name: str) -> None:
    world, options = LAYOUTS[name]
    counts = pool.run(load_in_layout, saved, options, world=world)
    assert sum(counts) == len(saved) * sum(pool.run(load_in_layout, saved[:1], {}, world=1))


CHAIN: list[tuple[int, list[str]]] = [
    (1, []),
    (2, ["parallel.tp=2"]),
    (2, ["parallel.pp=2"]),
    (2, ["parallel.dp=2"]),
    (4, ["parallel.tp=2", "parallel.pp=2"]),
    (4, ["parallel.dp=4", "batch.micro_batches=1"]),
    (4, ["parallel.ring=2", "parallel.ulysses=2"]),
    (2, ["parallel.pp=2", "parallel.split=[1,3]"]),
    (8, ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"]),
]


def test_training_goes_on_from_layout_to_layout(pool: WorkerPool, tmp_path: Path) -> None:
    """A step in each layout, each from the checkpoint of the one before, against as many steps in one process.

    Losses are equal to a few unit roundoffs (6e-8) of a loss of size 5, grown over nine steps: fp32 sums in another
    order. A moment that was lost or went to another tensor would change Adam's step by its whole size, lr=1e-2.
    """
    config = write_config(tmp_path, train={"steps": len(CHAIN)})
    more = ["model.config.decoder.layers=4"]
    whole = pool.run(run_steps, config, [*more, f"output.dir={tmp_path / 'whole'}"], len(CHAIN), False, world=1)[0]
    losses = []
    for step, (world, overrides) in enumerate(CHAIN):
        options = [*more, *overrides, f"output.dir={tmp_path / 'chain'}"]
        (stats,) = pool.run(run_steps, config, options, step + 1, step > 0, world=world)[0]
        losses.append(stats["loss"])
    assert losses == pytest.approx([stats["loss"] for stats in whole], rel=1e-5)
    assert losses[-1] < losses[0] - 0.3, "nothing was learned, so nothing was compared"
