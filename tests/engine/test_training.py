"""The trainer in one process and in several: same losses, exact resume, unreadable images.

The oracle of these tests is the trainer itself on one rank, which the parity tests compare with transformers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.engine.train_jobs import (
    another_profile,
    folder_of_its_own,
    programs_made_in_steps,
    resume_line,
    run_steps,
    see_less,
)
from tests.tiny import write_config
from tetrascope.engine.config_file import load_config
from tetrascope.engine.predict import load_hardware, save_hardware
from tetrascope.engine.setup import open_data, prepare
from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf
from tetrascope.tools.verify.pool import RankFailure, WorkerPool

CONTEXT = "fp32 sums in another order: a few unit roundoffs (6e-8) of a loss of size 5, grown over six steps"
RELATIVE = 1e-5


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def _losses(stats: list[dict[str, float]]) -> list[float]:
    return [s["loss"] for s in stats]


def test_layout_does_not_change_the_losses(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    one = run_in(pool, config, tmp_path / "one", [], 1)
    four = run_in(pool, config, tmp_path / "four", ["parallel.tp=2", "parallel.pp=2"], 4)
    data = run_in(pool, config, tmp_path / "data", ["parallel.dp=2", "parallel.pp=2", "batch.micro_batches=3"], 4)
    assert _losses(one)[-1] < _losses(one)[0] - 0.3, "nothing was learned, so nothing was compared"
    assert _losses(four) == pytest.approx(_losses(one), rel=RELATIVE), CONTEXT
    assert _losses(data) == pytest.approx(_losses(one), rel=RELATIVE), CONTEXT
    assert [s["grad_norm"] for s in four] == pytest.approx([s["grad_norm"] for s in one], rel=1e-4)
    assert {s["tokens"] for s in four} == {s["tokens"] for s in one}


TOKENS = ["batch={tokens: 640, pack: 160}"]
"""A global batch of four packs, each of a few of the samples."""


def test_a_budget_of_tokens_trains_in_every_layout_and_resumes_in_another(
    pool: WorkerPool, config: Path, tmp_path: Path
) -> None:
    """The samples that wait lie in the checkpoint: a resumed run that forgot them would leave them out."""
    one = run_in(pool, config, tmp_path / "one", TOKENS, 1)
    assert all(320 < s["tokens"] <= 640 for s in one), "a pack that is half empty has room for one more sample"
    assert _losses(one)[-1] < _losses(one)[0] - 0.3, "nothing was learned, so nothing was compared"
    four = run_in(pool, config, tmp_path / "cut", [*TOKENS, "parallel.dp=4"], 4, stop=3)
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["cursor"]["waiting"], "nothing waited, so nothing of it was tested"
    four += run_in(pool, config, tmp_path / "cut", [*TOKENS, "parallel.dp=2", "parallel.tp=2"], 4, resume=True)
    assert _losses(four) == pytest.approx(_losses(one), rel=RELATIVE), CONTEXT
    assert [s["tokens"] for s in four] == [s["tokens"] for s in one]


def test_loss_weights(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """The oracle: the losses of the same samples alone, weighed by hand by their numbers of supervised tokens."""
    lines = []
    for i in range(4):
        messages = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * 5**i}]
        lines.append(json.dumps({"id": str(i), "messages": messages}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    fixed = ["data.shuffle=false", "optimizer.lr=1e-30"]
    alone = run_in(pool, config, tmp_path / "alone", [*fixed, "batch={samples: 1}"], 1, stop=4)
    counts = supervised(config)
    assert counts[3] > 50 * counts[0]
    for mode, weights in (("token", counts), ("sample", counts**0), ("sqrt", counts**0.5)):
        options = [*fixed, f"batch={{samples: 4, micro_batches: 2, loss: {mode}}}"]
        (stats,) = run_in(pool, config, tmp_path / mode, [*options, "parallel.dp=2"], 2, stop=1)
        assert stats["loss"] == pytest.approx(np.average(_losses(alone), weights=weights), rel=RELATIVE)


def supervised(config: Path) -> np.ndarray:
    """Supervised tokens of every sample."""
    setup = prepare(load_config(config, []), 1)
    return open_data(setup).indexes[0].columns["supervised"]


def test_workers_and_a_cache_change_nothing_but_who_decodes(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    plain = run_in(pool, config, tmp_path / "plain", [], 1, stop=4)
    cache = tmp_path / "cache"
    options = ["data.workers=1", "data.prefetch=2", f"data.decode_cache={{dir: {cache}, bytes: 10000000}}"]
    for out in ("first", "second"):
        split = run_in(pool, config, tmp_path / out, [*options, "parallel.pp=2"], 2, stop=4)
        assert _losses(split) == pytest.approx(_losses(plain), rel=RELATIVE), CONTEXT
        kept = list(cache.rglob("*.frames"))
        assert len(kept) == 20  # each of the pictures once
    _truncate(tmp_path, "7.png")
    again = run_in(pool, config, tmp_path / "again", [*options, "data.max_bad_samples=1"], 1, stop=4)
    assert again[-1]["skipped"] == 1, "the cache knows that the file is another one now"
    assert all(0 < s["packing"] <= 1 <= s["decoder_imbalance"] for s in again)


def test_videos_train_in_every_layout(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    add_videos(tmp_path / "train.jsonl", 6)
    several = ["data.max_frames=6", "data.video_max_pixels=3136"]
    one = run_in(pool, config, tmp_path / "one", several, 1, stop=3)
    four = run_in(pool, config, tmp_path / "four", [*several, "parallel.tp=2", "parallel.pp=2"], 4, stop=3)
    assert _losses(four) == pytest.approx(_losses(one), rel=RELATIVE), CONTEXT
    alone = run_in(pool, config, tmp_path / "alone", [*several, "data.max_frames=2"], 1, stop=3)
    assert sum(s["tokens"] for s in alone) < sum(s["tokens"] for s in one)  # so that there were frames to take away


def add_videos(data: Path, count: int) -> None:
    """Adds samples whose videos are the pictures of the others, in several orders, all of one size."""
    pictures = [f"{i}.png" for i in (1, 7, 13, 19)]  # those of one size, by write_data's rule
    lines = []
    for i in range(count):
        content = [{"type": "video", "video": pictures[i % 2 :: 1] * 2}, {"type": "text", "text": f"and {i}?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"{i} frames"}]
        lines.append(json.dumps({"id": f"v{i}", "messages": messages}))
    data.write_text("\n".join([*lines, data.read_text()]))


def run_in(
    pool: WorkerPool, config: Path, out: Path, overrides: list[str], world: int, stop: int = 6, resume: bool = False
) -> list[dict[str, float]]:
    """Runs steps in a layout; all ranks must report the same but for times. Returns rank 0's report."""
    ranks = pool.run(run_steps, config, [*overrides, f"output.dir={out}"], stop, resume, world=world)
    for rank in ranks:
        assert _losses(rank) == _losses(ranks[0])
    return ranks[0]


@pytest.mark.parametrize(
    "overrides",
    [["parallel.tp=2", "parallel.pp=2"], ["parallel.dp=4"], []],
    ids=["same layout", "other layout", "one rank"],
)
def test_resume_goes_on_as_if_nothing_had_happened(
    pool: WorkerPool, config: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """Three steps, a checkpoint, three more, in the same layout or another, against six without a break."""
    whole = run_in(pool, config, tmp_path / "whole", ["parallel.tp=2", "parallel.pp=2"], 4)
    run_in(pool, config, tmp_path / "cut", ["parallel.tp=2", "parallel.pp=2"], 4, stop=3)
    world = 4 if overrides else 1
    rest = run_in(pool, config, tmp_path / "cut", [*overrides, "batch.micro_batches=2"], world, resume=True)
    assert len(rest) == 3
    if overrides == ["parallel.tp=2", "parallel.pp=2"]:
        assert _losses(rest) == _losses(whole)[3:], "the same layout must go on bit for bit"
    assert _losses(rest) == pytest.approx(_losses(whole)[3:], rel=RELATIVE), CONTEXT


def test_a_finished_folder_is_not_overwritten(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    run_in(pool, config, tmp_path / "run", [], 1, stop=1)
    with pytest.raises(RankFailure, match="already holds step-000001; add --resume"):
        run_in(pool, config, tmp_path / "run", [], 1, stop=1)


def test_training_starts_from_a_hugging_face_folder(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """Three steps, an export, and a new run from it: its first loss is that of the trained weights, in any layout."""
    scratch = run_in(pool, config, tmp_path / "scratch", [], 1, stop=3)
    native_to_hf(tmp_path / "scratch" / "checkpoints" / "step-000003", tmp_path / "hf", "float32")
    raw = yaml.safe_load(config.read_text())
    raw["model"] = {"family": "qwen2_vl", "init_from": str(tmp_path / "hf")}
    config.write_text(yaml.safe_dump(raw))
    one = run_in(pool, config, tmp_path / "one", [], 1, stop=1)
    four = run_in(pool, config, tmp_path / "four", ["parallel.tp=2", "parallel.pp=2"], 4, stop=1)
    assert _losses(one)[0] < _losses(scratch)[0] - 0.1
    assert _losses(four) == pytest.approx(_losses(one), rel=RELATIVE), CONTEXT


def test_a_checkpoint_of_another_model_or_with_a_hole_is_named(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_in(pool, config, out, ["parallel.pp=2"], 2, stop=1)
    with pytest.raises(RankFailure, match=r"UserError: .*step-000001: expected .* it belongs to another model config"):
        run_in(pool, config, out, ["parallel.pp=2", "model.config.decoder.intermediate=64"], 2, resume=True)
    largest = max((out / "checkpoints" / "step-000001").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"")
    with pytest.raises(RankFailure, match=r"UserError: .*no checkpoint is whole: step-000001 \(__0_0.distcp has 0"):
        run_in(pool, config, out, ["parallel.pp=2"], 2, resume=True)


def test_resume_says_when_the_order_of_samples_changes(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    run_in(pool, config, tmp_path / "run", [], 1, stop=1)
    (line,) = pool.run(resume_line, config, [f"output.dir={tmp_path / 'run'}", "train.seed=5"], world=1)
    assert "train.seed was 0, is 5: samples come in another order" in line
    (line,) = pool.run(resume_line, config, [f"output.dir={tmp_path / 'run'}", "optimizer.lr=5"], world=1)
    assert "step-000001, step 1" in line and "note" not in line
    file = tmp_path / "train.jsonl"
    weighed = f"data.sources=[{{path: {file}, name: train, weight: 2}}]"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    overrides = [f"output.dir={tmp_path / 'run'}", "data.train=null", weighed]
    (line,) = pool.run(resume_line, config, overrides, world=1)
    assert "weight of source train was 1.0, is 2.0, number of samples of source train was 24, is 23: samples" in line


def test_ranks_that_see_other_data_refuse(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """Their plans would differ, and they would wait for each other for ever."""
    with pytest.raises(RankFailure, match=r"source train .* changed while the ranks opened it"):
        pool.run(see_less, config, [f"output.dir={tmp_path / 'run'}", "parallel.dp=2"], world=2)


def test_ranks_that_do_not_share_the_output_folder_refuse(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """As on two nodes without common storage; all ranks must refuse, not only the one that does not see it."""
    with pytest.raises(RankFailure, match="must be on storage that all nodes share") as failure:
        pool.run(folder_of_its_own, tmp_path, world=2)
    assert str(failure.value).count("must be on storage that all nodes share") >= 2


def _truncate(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2000])  # the header stays whole


def test_unreadable_image_is_skipped_on_all_ranks(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """Its sample has no weight, wherever it is decoded; the others' loss is divided by what is left.

    The oracle: the same run in another layout, where another rank decodes it in another micro-batch.
    """
    clean = run_in(pool, config, tmp_path / "clean", [], 1, stop=3)
    _truncate(tmp_path, "7.png")
    some = ["data.max_bad_samples=5"]
    one = run_in(pool, config, tmp_path / "one", some, 1, stop=3)
    split = run_in(pool, config, tmp_path / "split", [*some, "parallel.dp=2", "parallel.pp=2"], 4, stop=3)
    assert [s["skipped"] for s in one][-1] == 1, "three steps of eight see all 24 samples"
    assert "s7" in str(one[-1]["skipped_names"]) and "7.png" in str(one[-1]["skipped_names"])
    assert split[-1]["skipped_names"] == one[-1]["skipped_names"], "all ranks know why, whichever decoded it"
    assert _losses(split) == pytest.approx(_losses(one), rel=RELATIVE)
    assert _losses(one) != pytest.approx(_losses(clean), rel=1e-4)


@pytest.mark.parametrize("degree", ["ring", "ulysses"])
def test_an_unreadable_image_under_context_parallelism(
    pool: WorkerPool, config: Path, tmp_path: Path, degree: str
) -> None:
    """Only one of the ranks that share the sample finds out; what they send each other must not change."""
    _truncate(tmp_path, "7.png")
    some = ["data.max_bad_samples=5", "data.shuffle=false"]
    one = run_in(pool, config, tmp_path / "one", some, 1, stop=1)
    shared = run_in(pool, config, tmp_path / "shared", [*some, f"parallel.{degree}=2"], 2, stop=1)
    assert shared[-1]["skipped_names"] == one[-1]["skipped_names"] != []
    assert _losses(shared) == pytest.approx(_losses(one), rel=RELATIVE)


def test_what_is_left_of_a_step_with_an_unreadable_image(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """The oracle: the losses of the readable samples alone, weighed by hand. Another sample dropped would show."""
    fixed = ["data.shuffle=false", "optimizer.lr=1e-30", "data.max_bad_samples=5"]
    alone = _losses(run_in(pool, config, tmp_path / "alone", [*fixed, "batch={samples: 1}"], 1, stop=8))
    _truncate(tmp_path, "7.png")
    (stats,) = run_in(pool, config, tmp_path / "eight", [*fixed, "parallel.dp=2"], 2, stop=1)
    assert stats["skipped"] == 1
    assert stats["loss"] == pytest.approx(np.average(alone[:7], weights=supervised(config)[:7]), rel=RELATIVE)


def test_too_many_unreadable_images_stop_the_run(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    _truncate(tmp_path, "7.png")
    _truncate(tmp_path, "9.png")
    with pytest.raises(RankFailure, match=r"data\.max_bad_samples: 2 samples cannot be used, more than the 1"):
        run_in(pool, config, tmp_path / "run", ["data.max_bad_samples=1", "parallel.pp=2"], 2, stop=3)


def test_bfloat16_follows_float32(pool: WorkerPool, config: Path, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: losses agree to about 2⁻⁸ of their size, and master weights keep learning from small steps.

    With masters in bf16 an update below 2⁻⁹ of a weight would be lost; lr is chosen so that most are.
    """
    options = ["optimizer.lr=1e-3", "parallel.tp=2", "parallel.dp=2"]
    exact = run_in(pool, config, tmp_path / "fp32", options, 4)
    half = run_in(pool, config, tmp_path / "bf16", [*options, "train.dtype=bfloat16"], 4)
    assert _losses(half) == pytest.approx(_losses(exact), rel=2**-7)
    fall = _losses(exact)[0] - _losses(exact)[-1]
    assert _losses(half)[0] - _losses(half)[-1] == pytest.approx(fall, rel=0.25)


def test_ranks_that_read_other_hardware_files_refuse(pool: WorkerPool, config: Path) -> None:
    for rank, nodes in enumerate((8, 4)):
        found = replace(load_hardware("cpu"), gpus_per_node=nodes)
        save_hardware(found, config.parent / f"{rank}.yaml")
    with pytest.raises(RankFailure, match=r"parallel\.hardware: not every rank reads the same profile as rank 0"):
        pool.run(another_profile, config, ["parallel.pp=2"], world=2)


def test_schedules_are_made_ready_while_the_step_before_runs(pool: WorkerPool, config: Path) -> None:
    options = ["parallel.pp=2", "parallel.schedule=cost", "batch.micro_batches=4"]
    for made, schedules in pool.run(programs_made_in_steps, config, options, 4, world=2):
        assert made == 0
        assert schedules > 1
