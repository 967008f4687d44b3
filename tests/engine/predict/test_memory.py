"""Static bytes by formula against the engine's own stages, built on the meta device by `dry_run`.

Equal to the byte, since every flat buffer is rounded up by itself: a parameter in the wrong buffer shows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from tetrascope.engine.config_file import load_config
from tetrascope.engine.dryrun import dry_run
from tetrascope.engine.predict import Model
from tetrascope.engine.predict.model import parts_of
from tetrascope.models.family import FAMILIES
from tetrascope.tools.verify.families import get_oracle

FROZEN = {"vision": {"frozen": True}, "embeddings": {"lr": 1e-5}}
DATA = (3, 7, 11, 13, 17, 19, 23)
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    *((name, {"tp": 2, "pp": 2, "dp": dp}, "bfloat16", {}) for name, dp in zip(sorted(FAMILIES), DATA, strict=True)),
    ("qwen2_vl", {"tp": 1, "pp": 1, "dp": 1}, "float32", {}),
    ("qwen2_vl", {"tp": 2, "pp": 1, "dp": 7}, "float32", FROZEN),
    ("internvl", {"tp": 1, "pp": 2, "dp": 5, "schedule": "zb-v"}, "bfloat16", FROZEN),
    ("qwen2_5_vl", {"tp": 2, "pp": 2, "dp": 1, "schedule": "interleaved"}, "bfloat16", {"language": {"frozen": True}}),
]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(("name", "parallel", "dtype", "modules"), CASES)
def test_equals_the_engine(
    tmp_path: Path, name: str, parallel: dict[str, Any], dtype: str, modules: dict[str, Any], tied: bool
) -> None:
    config = next(iter(get_oracle(name).variants().values())).config
    raw = _plain(dataclasses.asdict(config))
    raw["decoder"] |= {"layers": 5, "tied_embeddings": tied}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"family": name, "config": raw},
                "data": {"train": "none.jsonl", "tokenizer": "none"},
                "batch": {"samples": 4 * parallel["dp"], "micro_batches": 4},
                "parallel": parallel,
                "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "modules": modules},
                "train": {"steps": 1, "dtype": dtype},
                "output": {"dir": "none"},
            }
        )
    )
    found = dry_run(load_config(path))
    made = found.blueprint
    model = Model(made.family, made.model_config, made.modules, dtype)
    cut = made.pipeline.cut
    for stage, expected in enumerate(found.stages):
        held = [part for chunk in cut.chunks(stage) for part in parts_of(cut, chunk)]
        got = model.sizes(made.layout.tp).stage(held, made.layout.dp, model.item)
        assert got.weight_bytes == expected.weight_bytes
        assert got.gradient_bytes == expected.gradient_bytes
        assert got.state_bytes == expected.state_bytes


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
