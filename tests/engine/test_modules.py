"""Which parameters are trained, with what settings, and what frozen ones do not cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.engine.module_jobs import saved_bytes, training_bytes
from tests.tiny import write_config
from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.config_file import load_config, validated
from tetrascope.engine.modules import ModuleOptions, Trained, resolve, summary, trained
from tetrascope.engine.setup import prepare
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.tools.verify.families.qwen2_vl import make_case, tiny_config
from tetrascope.tools.verify.pool import WorkerPool

WEIGHTS = FAMILY.weights(tiny_config())
TIED = FAMILY.weights(tiny_config(tied=True))


def section(**modules: dict[str, Any]) -> OptimizerSection:
    raw = {"lr": 1e-5, "weight_decay": 0.1, "modules": modules}
    found: OptimizerSection = validated(OptimizerSection, raw, "optimizer")
    return found


FROZEN = {"frozen": True}


def test_modules_and_expressions_in_the_order_written() -> None:
    options = section(
        vision=FROZEN,
        adaptor={"lr": 1e-3},
        language={"lr": 2e-5, "weight_decay": 0.0},
        embeddings=FROZEN,
        **{r"layers\.[0-1]\..*": {"frozen": True}, r"layers\.1\.mlp\..*": {"frozen": False, "weight_decay": 0.3}},
    )
    found = resolve(WEIGHTS, options)
    assert found.keys() == WEIGHTS.keys()
    assert found["vision.blocks.1.norm1.weight"].frozen and found["embed.weight"].frozen and found["head.weight"].frozen
    assert found["adaptor.fc1.bias"] == ModuleOptions(False, 1e-3, 0.1)
    assert found["layers.2.attention.qkv.weight"] == found["norm.weight"] == ModuleOptions(False, 2e-5, 0.0)
    assert found["layers.0.mlp.down.weight"].frozen and found["layers.1.attention.qkv.weight"].frozen
    assert found["layers.1.mlp.down.weight"] == ModuleOptions(False, 2e-5, 0.3), "field by field"


def test_later_entries_win_over_earlier_ones() -> None:
    expression = r"layers\.0\..*"
    first = resolve(WEIGHTS, section(**{expression: {"lr": 3.0}, "language": {"lr": 2.0}}))
    last = resolve(WEIGHTS, section(**{"language": {"lr": 2.0}, expression: {"lr": 3.0}}))
    assert first["layers.0.mlp.down.weight"].lr == 2.0 and last["layers.0.mlp.down.weight"].lr == 3.0


def test_expressions_match_whole_names() -> None:
    with pytest.raises(UserError, match=r"'layers\\\\.1' matches no parameter; .*whole parameter names"):
        resolve(WEIGHTS, section(**{r"layers\.1": FROZEN}))


def test_without_entries_all_is_trained_alike() -> None:
    assert set(resolve(WEIGHTS, section()).values()) == {ModuleOptions(False, 1e-5, 0.1)}


def test_what_takes_no_part_is_frozen_whatever_the_entries_say() -> None:
    found = resolve(WEIGHTS, section(vision={"frozen": False, "lr": 1.0}), (r"vision\.blocks\.1\..*",))
    assert {name for name, own in found.items() if own.frozen} == {
        n for n in WEIGHTS if n.startswith("vision.blocks.1.")
    }


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"vison": FROZEN}, r"'vison' matches no parameter; did you mean 'vision'\?"),
        ({"layer": FROZEN}, r"'layer' matches no parameter; give a module \(vision, adaptor, language, embeddings\)"),
        ({"layers.9.*x": FROZEN}, "matches no parameter"),
        ({"layers.(": FROZEN}, r"'layers.\(' is neither a module .* nor a regular expression: missing \)"),
        ({"vision": FROZEN, "adaptor": FROZEN, "language": FROZEN, "embeddings": FROZEN}, "everything is frozen"),
        ({".*": FROZEN}, "everything is frozen; leave at least one parameter to train"),
    ],
)
def test_entries_that_cannot_be_meant(modules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^optimizer.modules: .*{message}"):
        resolve(WEIGHTS, section(**modules))


def test_a_module_that_the_model_lacks_is_named() -> None:
    weights = {name: pieces for name, pieces in WEIGHTS.items() if not name.startswith("vision.")}
    with pytest.raises(UserError, match="'vision': this model has no such parameters; remove the entry"):
        resolve(weights, section(vision=FROZEN))


@pytest.mark.parametrize("settings", [FROZEN, {"lr": 1.0}, {"weight_decay": 0.0}], ids=str)
def test_tied_embeddings_are_one_parameter(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"embed.weight \(.*\) and head.weight \(.*\) are one tensor, .*set both alike"):
        resolve(TIED, section(**{r"head\..*": settings}))
    resolve(TIED, section(embeddings=settings))
    resolve(WEIGHTS, section(**{r"head\..*": settings}))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"vision": {"frozn": True}},
            r"unknown key 'modules\.vision\.frozn'; did you mean 'modules\.vision\.frozen'\?",
        ),
        (
            {"layers.[01].*": {"zzz": 1}},
            r"unknown key 'modules\.layers\.\[01\]\.\*\.zzz'; known keys: frozen, lr, weight",
        ),
        ({"vision": {"lr": 0}}, r"'modules\.vision\.lr' is 0: input should be greater than 0"),
        ({"vision": {"frozen": True, "lr": 1.0}}, "'modules.vision' is .*what is frozen has no lr and no weight_decay"),
        ({"vision": None}, r"'modules\.vision' is None: input should be a valid dictionary"),
    ],
)
def test_settings_that_cannot_be_meant(modules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^optimizer: {message}"):
        section(**modules)


def test_mistakes_are_found_before_anything_starts(tmp_path: Path) -> None:
    path = write_config(tmp_path, optimizer={"modules": {"vision": FROZEN}})
    assert prepare(load_config(path), 1).modules["vision.patch_embed.weight"].frozen
    override = "optimizer.modules.vison.frozen=true"
    with pytest.raises(UserError, match="did you mean 'vision'"):
        prepare(load_config(path, [override]), 1)


def test_the_order_written_survives_the_file_and_json(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("vision: {lr: 1.0e-3}\n'.*': {lr: 1}\nadaptor: {lr: 3}\n")
    options = section(**yaml.safe_load(path.read_text()))
    assert list(options.modules) == ["vision", ".*", "adaptor"]
    assert validated(OptimizerSection, options.model_dump(mode="json"), "checkpoint") == options


def test_modules_with_anything_trained() -> None:
    assert trained(resolve(WEIGHTS, section())) == Trained(True, True, True, True)
    found = resolve(WEIGHTS, section(vision=FROZEN, embeddings=FROZEN, **{r"layers\..*": FROZEN}))
    assert trained(found) == Trained(vision=False, adaptor=True, language=True, embeddings=False)


def test_summary_counts_tied_parameters_once() -> None:
    embedding = 251 * 64
    total = sum(tensor.numel() for tensor in make_case().weights.values())
    assert summary(WEIGHTS, resolve(WEIGHTS, section())) == f"{total:,} parameters trained, 0 frozen"
    found = resolve(TIED, section(embeddings=FROZEN))
    assert summary(TIED, found) == f"{total - 2 * embedding:,} parameters trained, {embedding:,} frozen"
    found = resolve(WEIGHTS, section(embeddings=FROZEN, adaptor={"lr": 1e-3}, **{r"layers\.0\..*": {"lr": 2e-5}}))
    assert summary(WEIGHTS, found).endswith(
        f", {2 * embedding:,} frozen; lr: vision 1e-05, adaptor 0.001, language 1e-05 to 2e-05"
    )


def test_frozen_parts_keep_no_activations(pool: WorkerPool) -> None:
    """Counted by hooks on what autograd saves; all of it where everything is trained, so that the count sees it."""

    def saved(**modules: dict[str, Any]) -> dict[str, int]:
        (found,) = pool.run(saved_bytes, make_case(), section(**modules), world=1)
        assert isinstance(found, dict)
        return found

    whole = saved()
    assert min(size for name, size in whole.items() if name not in ("embed", "norm", "deliver")) > 10_000, whole
    without_vision = saved(vision=FROZEN)
    assert without_vision == {**whole, "vision": 0}
    upper = saved(vision=FROZEN, adaptor=FROZEN, embeddings=FROZEN, **{r"layers\.[0-2]\..*": FROZEN})
    lower = ("vision", "adaptor", "embed", "layers.0", "layers.1", "layers.2")
    assert {name: upper[name] for name in lower} == dict.fromkeys(lower, 0)
    assert 0 < upper["layers.3"] <= whole["layers.3"] and upper["layers.4"] == whole["layers.4"]


@pytest.mark.parametrize(
    ("dtype", "frozen_bytes", "trained_bytes"),
    [(torch.float32, 4, 4 + 4 + 8), (torch.bfloat16, 2, 2 + 4 + 4 + 8)],
    ids=["float32", "bfloat16"],
)
def test_frozen_parameters_cost_no_more_than_themselves(
    pool: WorkerPool, dtype: torch.dtype, frozen_bytes: int, trained_bytes: int
) -> None:
    """Bytes an element: the parameter; trained, also an fp32 gradient, the master where it is another, two moments."""
    options = section(vision=FROZEN, language=FROZEN, embeddings=FROZEN)
    ((taken, trained, frozen),) = pool.run(training_bytes, make_case(), options, dtype, world=1)
    assert trained and frozen > 10 * trained
    counters = 100  # Adam's step counts, four bytes a group
    assert 0 <= taken - trained * trained_bytes - frozen * frozen_bytes <= counters
