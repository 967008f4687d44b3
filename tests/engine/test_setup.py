"""What is checked before any process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import write_config
from tetrascope.engine import setup
from tetrascope.engine.attention import attention_words
from tetrascope.engine.config_file import load_config
from tetrascope.engine.setup import _merged, prepare
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import Layout


def test_changes_reach_single_keys_inside_sections() -> None:
    base = {"decoder": {"hidden": 8, "layers": 2}, "rule": "paper", "section": (1, 2)}
    changed = _merged(base, {"decoder": {"layers": 3}, "rule": "hf", "section": [2, 1]})
    assert changed == {"decoder": {"hidden": 8, "layers": 3}, "rule": "hf", "section": [2, 1]}
    assert base["decoder"] == {"hidden": 8, "layers": 2}
    assert _merged(base, {"decoder": 5})["decoder"] == 5, "left to the validation, which names the field"


def test_a_folder_of_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    config = load_config(write_config(tmp_path), [f"model={{family: qwen2_vl, init_from: {folder}}}"])
    with pytest.raises(UserError, match=r"no family knows a model with architectures \['BertModel'\] and model_type"):
        prepare(config, 1)
    monkeypatch.setattr(setup, "family_of", lambda raw: "other")
    with pytest.raises(UserError, match=r"model\.family: .* is of family 'other', not 'qwen2_vl'; set model\.family=o"):
        prepare(config, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The model has 4 attention heads and 2 key heads.
        (["parallel.ulysses=3"], r"parallel\.ulysses: 3 must divide the 4 attention heads .*; choose 2 or 4, and put"),
        (["parallel.ulysses=8"], r"parallel\.ulysses: 8 must divide the 4 attention heads .*; choose 4, and put"),
        (["parallel.tp=2", "parallel.ulysses=4"], r"must divide the 2 attention heads that tp=2 leaves .*; choose 2, "),
        (["parallel.tp=4"], r"parallel\.tp: 2 .* do not divide by tp=4; this model allows tp up to 2"),
        (
            ["kernels.context=flash9"],
            r"kernels\.context: the kernel 'flash9' is unknown on cpu .*; choose one of auto, ",
        ),
        (["kernels.context=varlen"], r"kernels\.context: the kernel 'varlen' cannot run on cpu with float32; choose "),
        (["kernels.context=varlen", "train.device=cuda"], r"train\.device: is cuda, but there is no GPU here"),
    ],
)
def test_context_parallelism_that_cannot_be(
    tmp_path: Path, changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to the process that starts a run, from the configuration alone: no rank is there yet."""

    def started(*args: object, **options: object) -> None:
        raise AssertionError("a process group was made")

    monkeypatch.setattr(torch.distributed, "init_process_group", started)
    config = load_config(write_config(tmp_path), changes)
    with pytest.raises(UserError, match=message):
        prepare(config, None)


def test_a_way_of_exchange_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'kernels\.exchange' is 'rings': .*'ring' or 'gathered'"):
        load_config(write_config(tmp_path), ["kernels.exchange=rings"])


def test_what_was_chosen_is_said(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    assert attention_words("sdpa", config, Layout(dp=2)) == "sdpa"
    both = attention_words("sdpa", config, Layout(ring=2, ulysses=4))
    assert both == "sdpa, in parts cpu-flash (Ulysses of 4, ring of 2)"
    config = load_config(write_config(tmp_path), ["kernels.exchange=gathered", "kernels.context=reference"])
    assert attention_words("sdpa", config, Layout(ring=2)) == "sdpa, in parts reference (gathered keys of 2)"


def test_context_is_divided_for_model_and_machine(tmp_path: Path) -> None:
    """4 attention heads; two ranks of the profile `cpu` lie in a node, eight of `h100-sxm`."""
    path = write_config(tmp_path)
    for changes, expected in (
        (["parallel.context=4"], Layout(ring=2, ulysses=2)),
        (["parallel.context=4", "parallel.hardware=h100-sxm"], Layout(ulysses=4)),
        (["parallel.context=4", "parallel.hardware=h100-sxm", "parallel.tp=2"], Layout(ring=2, ulysses=2, tp=2)),
        (["parallel.context=4", "parallel.ring=4"], Layout(ring=4)),
    ):
        found = prepare(load_config(path, changes), expected.world)
        assert found.layout == expected
        kept = found.config.parallel  # what a checkpoint keeps, and a resumed run reads
        assert (kept.context, kept.ring, kept.ulysses) == (4, expected.ring, expected.ulysses)
        assert type(kept).model_validate(kept.model_dump()) == kept
