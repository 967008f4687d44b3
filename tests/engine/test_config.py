"""The configuration of a run: every mistake is an error that names file and field, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tetrascope.engine.config import Config, ParallelSection
from tetrascope.engine.config_file import load_config, validated
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.parallel.mesh import Layout

GOOD: dict[str, Any] = {
    "model": {"family": "qwen2_vl", "config": {"decoder": {"hidden": 64}}},
    "data": {"train": "train.jsonl", "tokenizer": "tokenizer"},
    "batch": {"samples": 8},
    "optimizer": {"lr": 0.001},
    "train": {"steps": 10},
    "output": {"dir": "out"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return file


def test_file_overrides_and_defaults(path: Path) -> None:
    config = load_config(
        path,
        [
            "train.steps=20",
            "optimizer.lr=3e-4",  # YAML reads this as text
            "optimizer.clip=null",
            "parallel.dp=null",
            "parallel.split=[2, 3]",
            "optimizer.betas=[0.8, 0.9]",
            "model.config.decoder.heads=4",
            "output.dir=a=b",
        ],
    )
    assert config.train.steps == 20 and config.optimizer.lr == 3e-4
    assert config.optimizer.clip is None and config.parallel.dp is None
    assert config.parallel.split == [2, 3] and config.optimizer.betas == (0.8, 0.9)
    assert config.model.config == {"decoder": {"hidden": 64, "heads": 4}}
    assert config.output.dir == Path("a=b")
    assert config.batch.micro_batches == 1 and config.parallel.split != load_config(path).parallel.split == "auto"
    assert load_config(path).train.steps == 10  # the file is left alone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", r"unknown key 'train\.stpes'; did you mean 'train\.steps'\?"),
        ("paralel.tp=2", r"unknown key 'paralel'; did you mean 'parallel'\?"),
        (
            "zzz=1",
            "unknown key .zzz.; known keys: batch, checkpoint, data, kernels, model, optimizer, output, parallel",
        ),
        ("train.steps=many", r"'train\.steps' is 'many': input should be a valid integer"),
        ("train.steps=1.5", r"'train\.steps' is 1\.5: input should be a valid integer"),
        ("train.steps=0", r"'train\.steps' is 0: input should be greater than 0"),
        ("train.dtype=float16", r"'train\.dtype' is 'float16': input should be 'float32' or 'bfloat16'"),
        ("train.seed=18446744073709551616", r"'train\.seed' is 18446744073709551616: input should be less than"),
        ("train=3", r"'train' is 3: input should be a valid dictionary"),
        ("optimizer.lr=.inf", r"'optimizer\.lr' is inf: input should be a finite number"),
        ("optimizer.lr=-1", r"'optimizer\.lr' is -1: input should be greater than 0"),
        ("optimizer.betas=[0.9, 1.5]", r"'optimizer\.betas\.1' is 1\.5: input should be less than 1"),
        ("optimizer.betas=[0.9]", r"'optimizer\.betas\.1' is missing; add it"),
        ("optimizer.min_lr_ratio=2", r"'optimizer\.min_lr_ratio' is 2: input should be less than or equal to 1"),
        ("parallel.split=half", r"'parallel\.split' is 'half': input should be 'auto'; .*valid list"),
        ("parallel.split=[0, 2]", r"'parallel\.split\.0' is 0: input should be greater than 0"),
        ("parallel.tp=0", r"'parallel\.tp' is 0: input should be greater than 0"),
    ],
)
def test_wrong_values_name_file_and_field(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(path, [override])
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expected section.key=value, as in train.steps=100"),
        ("=3", "expected section.key=value"),
        ("a..b=3", "expected section.key=value"),
        ("train.steps.x=3", "'steps' is a value, not a section"),
        ("train.steps=[", r"'\[' is not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_read_name_themselves(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(path, [override])
    assert str(error.value).startswith(f"override {override!r}: ")


@pytest.mark.parametrize("section", ["model", "data", "batch", "optimizer", "train", "output"])
def test_missing_sections_are_named(path: Path, section: str) -> None:
    path.write_text(yaml.safe_dump({key: value for key, value in GOOD.items() if key != section}))
    with pytest.raises(UserError, match=f"^{path}: '{section}' is missing; add it$"):
        load_config(path)


def test_all_mistakes_are_told_at_once(path: Path) -> None:
    with pytest.raises(UserError, match=r"'train\.steps' is 0.*unknown key 'train\.foo'"):
        load_config(path, ["train.steps=0", "train.foo=1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping of sections"),
        (b"- 1", "expected a mapping of sections"),
        (b"a: [", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"train: {steps: 1}\ntrain: {steps: 2}", "not valid YAML.*'train' comes twice(?s:.*)line 2"),
        (b"train:\n  steps: 1\n  steps: 2", "not valid YAML.*'steps' comes twice(?s:.*)line 3"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_files_that_are_no_configuration(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)


def test_model_shapes_are_checked_like_the_rest() -> None:
    decoder = {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "kv_heads": 2, "vocab": 10}
    ids = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    raw = {
        "decoder": decoder,
        "vision": {"width": 32, "layers": 1, "heads": 2},
        "mrope_section": [2, 3, 3],
        **{name: i for i, name in enumerate([*ids, "eos_token_id", "pad_token_id"])},
    }
    assert validated(Qwen2VLConfig, raw, "model.config").decoder.heads == 4
    for change, message in (
        ({"decoder": {**decoder, "hiden": 3}}, r"unknown key 'decoder\.hiden'; did you mean 'decoder\.hidden'\?"),
        ({"vison": {}}, r"unknown key 'vison'; did you mean 'vision'\?"),
        ({"decoder": {**decoder, "layers": "two"}}, r"'decoder\.layers' is 'two': input should be a valid integer"),
        ({"decoder": {k: v for k, v in decoder.items() if k != "vocab"}}, r"'decoder\.vocab' is missing; add it"),
        ({"mrope_section": [2, 6]}, r"'mrope_section\.2' is missing; add it"),
        ({"position_rule": "mine"}, "position_rule: 'mine' must be"),
    ):
        with pytest.raises(UserError, match=message):
            validated(Qwen2VLConfig, {**raw, **change}, "model.config")


def test_configuration_cannot_be_changed_afterwards(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_round_trip_through_json(path: Path) -> None:
    # Checkpoints keep the configuration so.
    config = load_config(path, ["parallel.split=[1, 2]", "optimizer.clip=null"])
    assert validated(Config, config.model_dump(mode="json"), "checkpoint") == config


def test_layout_products() -> None:
    section = ParallelSection(tp=2, pp=3, dp=4, ring=1, ulysses=1)
    assert section.layout() == section.layout(24) == Layout(pp=3, dp=4, tp=2)
    assert ParallelSection(tp=2, dp=None).layout(10) == Layout(dp=5, tp=2)
    assert ParallelSection(tp=2, dp=None).layout() == Layout(tp=2)
    assert ParallelSection(tp=2, ring=2, ulysses=3, dp=None).layout(12).world == 12


@pytest.mark.parametrize(
    ("section", "world", "message"),
    [
        (ParallelSection(tp=2, pp=2), 8, r"dp=1, pp=2, ring=1, ulysses=1, tp=2 make 4 ranks, but 8 were started"),
        (ParallelSection(tp=2, pp=2, dp=2), 4, r"make 8 ranks, but 4 were started; start 8 ranks"),
        (ParallelSection(tp=3, dp=None), 8, r"8 ranks do not divide by .*tp=3 \(3\)"),
        (ParallelSection(tp=3, dp=None), 2, r"2 ranks do not divide by"),
    ],
)
def test_layouts_that_do_not_multiply_to_the_ranks(section: ParallelSection, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        section.layout(world)


def test_context_is_divided_or_must_agree() -> None:
    section = ParallelSection(tp=2, context=4, dp=None)
    assert section.chooses_degrees
    assert section.layout(16) == Layout(dp=2, ring=4, tp=2)  # as long as the model is not known
    assert ParallelSection(context=4, ring=2, ulysses=2).layout(4) == Layout(ring=2, ulysses=2)
    with pytest.raises(UserError, match="context=4, tp=2 make 8 ranks"):
        ParallelSection(tp=2, context=4).layout(4)
    with pytest.raises(ValueError, match="make 2 ranks, context says 4"):
        ParallelSection(context=4, ring=2)
