"""From configuration to pipeline: which chunk lies where, and what cannot be."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tetrascope.engine.config import BatchSection, ModuleSettings, OptimizerSection, ParallelSection
from tetrascope.engine.modules import family_modules
from tetrascope.engine.pipeline import Pipeline, Workload, make_pipeline
from tetrascope.engine.plan import Planner, SampleInfo
from tetrascope.engine.predict import Candidate, MicroBatchShape, Model, load_hardware, prepare
from tetrascope.engine.step_schedule import StepSchedules
from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.parallel.pipeline.actions import Kind, from_text, to_text
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.simulator import simulate
from tetrascope.parallel.pipeline.transforms import with_vision_chunk
from tetrascope.parallel.pipeline.validator import validate
from tetrascope.tools.verify.families.qwen2_vl import tiny_config

CONFIG = tiny_config(layers=12)
TIED = tiny_config(layers=12, tied=True)
FROZEN_VISION = {"vision": ModuleSettings(frozen=True), "adaptor": ModuleSettings(frozen=True)}
ALL_BUT_HEAD = {**FROZEN_VISION, "language": ModuleSettings(frozen=True), r"embed\..*": ModuleSettings(frozen=True)}


def made(
    micro_batches: int = 4, modules: dict[str, ModuleSettings] | None = None, samples: int = 1, **parallel: Any
) -> Pipeline:
    options = family_modules(FAMILY, CONFIG, OptimizerSection(lr=1, modules=modules or {}))
    return make_pipeline(FAMILY, CONFIG, ParallelSection(**parallel), options, Workload(micro_batches, samples))


@pytest.mark.parametrize(
    ("parallel", "placement"),
    [
        ({"schedule": "1f1b"}, (0, 1)),
        ({"schedule": "gpipe", "vision_chunk": True}, (0, 0, 1)),
        ({"schedule": "interleaved"}, (0, 1, 0, 1)),
        ({"schedule": "interleaved", "virtual_stages": 3}, (0, 1, 0, 1, 0, 1)),
        ({"schedule": "zb-v"}, (0, 1, 1, 0)),
        ({"schedule": "zb-h1"}, (0, 1)),
        ({"schedule": "cost"}, (0, 0, 1)),
        ({"schedule": "cost", "vision_chunk": False}, (0, 1)),
        ({"schedule": "cost", "virtual_stages": 2}, (0, 0, 1, 0, 1)),
        ({"schedule": "cost", "placement": "fold"}, (0, 0, 1, 1, 0)),
    ],
)
def test_where_chunks_lie(parallel: dict[str, Any], placement: tuple[int, ...]) -> None:
    found = made(pp=2, **parallel)
    assert found.cut.placement == placement
    assert [i for layers in found.cut.layers for i in layers] == list(range(12))
    assert all(found.cut.counts) and found.frozen == 0
    assert (found.schedule is None) == (parallel["schedule"] == "cost")
    if found.schedule:
        validate(found.schedule, 4)


def lines_of(placement: tuple[int, ...]) -> str:
    """A schedule of four micro-batches with chunks on these stages, one chunk after the other."""
    lines: list[list[str]] = [[] for _ in range(max(placement) + 1)]
    chunks = list(enumerate(placement))
    for kind, order in (("F", chunks), ("B", chunks[::-1])):
        for chunk, stage in order:
            lines[stage] += [f"{kind}{m}c{chunk}" for m in range(4)]
    return "\n".join(map(" ".join, lines))


@pytest.mark.parametrize(
    ("placement", "config", "vision_chunk", "message"),
    [
        ((0, 2, 1), CONFIG, None, None),
        ((0, 1, 2, 0), TIED, None, None),
        ((0, 0, 1), CONFIG, True, None),
        ((1, 0), CONFIG, None, r"chunk 0 on stage 1; it reads the images, .* stage 0"),
        ((0, 1, 0), CONFIG, True, r"chunk 1 on stage 1; it holds the token embedding"),
        ((0,), CONFIG, True, r"parallel.vision_chunk: .*own.txt has one chunk"),
        ((0, 2, 1), TIED, None, r"last chunk on stage 1; its output head .* stage 0 or 2"),
    ],
)
def test_where_the_ends_of_the_model_may_be(
    tmp_path: Path, placement: tuple[int, ...], config: Any, vision_chunk: bool | None, message: str | None
) -> None:
    file = tmp_path / "own.txt"
    file.write_text(lines_of(placement))
    options = ParallelSection(pp=max(placement) + 1, schedule=str(file), vision_chunk=vision_chunk)
    modules = family_modules(FAMILY, config, OptimizerSection(lr=1))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        assert make_pipeline(FAMILY, config, options, modules, Workload(4)).cut.placement == placement


def test_explicit_layers() -> None:
    assert made(pp=2, split=[3, 9]).cut.counts == (3, 9)
    assert made(pp=2, schedule="zb-v", split=[1, 2, 3, 6]).cut.layers == (
        range(0, 1),
        range(1, 3),
        range(3, 6),
        range(6, 12),
    )


def test_the_automatic_cut_counts_what_is_frozen() -> None:
    """The first stage gets more layers when the encoder before them has no backward."""
    trained, frozen = (made(pp=4, micro_batches=8, samples=4, modules=m).cut for m in (None, FROZEN_VISION))
    assert trained.counts[0] < frozen.counts[0]
    assert trained.counts[0] < min(trained.counts[1:])
    assert made(pp=3, micro_batches=8, modules=ALL_BUT_HEAD).frozen == 2


@pytest.mark.parametrize("schedule", GENERATORS)
def test_a_frozen_encoder_has_no_backward_in_the_schedule(schedule: str) -> None:
    found = made(pp=2, schedule=schedule, vision_chunk=True, modules=FROZEN_VISION)
    assert found.frozen == 1 and found.schedule is not None
    kinds = {action.kind for actions in found.schedule for action in actions if action.chunk == 0}
    assert kinds == {Kind.FORWARD}


def test_a_schedule_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text(to_text(GENERATORS["zb-v"](2, 4)))
    assert made(pp=2, schedule=str(file)).schedule == GENERATORS["zb-v"](2, 4)
    apart = with_vision_chunk(GENERATORS["1f1b"](2, 4))
    file.write_text(to_text(apart))
    found = made(pp=2, schedule=str(file), vision_chunk=True)
    assert found.schedule == apart and found.cut.placement == (0, 0, 1) and found.cut.vision_chunk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0 F1 F2 F3 B0 B1 B2 B3\nF0 B0 F1 B1 F2 F3 B3", r"stage 1 ends at position 7 without B2"),
        ("F0 B0 F1 B1 F2 B2 F3 B3\nF1 F0 B0 B1 F2 B2 F3 B3", r"stage 1, position 0, F1"),
        ("B0 F0 F1 B1 F2 B2 F3 B3\nF0 B0 F1 B1 F2 B2 F3 B3", r"deadlock; stage 0, position 0, B0 waits for"),
        ("F0 B0 F1 B1 F2 B2 F3 B3", r"own.txt has 1 lines of actions, parallel.pp=2 stages"),
        ("F0 B0 F1 B1 F2 B2 F3 B3 X\n-", r"'X' is no action"),
        ("F0 B0 F1 B1 F2 B2 F3 B3\n-", r"stage 1 has no action"),
        ("F0 F1 F2 F3 B0 B1 B2 B3 F4\nF0 B0 F1 B1 F2 B2 F3 B3", r"stage 0, position 8, F4: there are 4 micro-batches"),
    ],
)
def test_a_bad_schedule_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        made(pp=2, schedule=str(tmp_path / "own.txt"))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"schedule": "2f2b"}, r"parallel.schedule: unknown '2f2b'; choose one of .*cost.* or name a file"),
        ({"schedule": "none/there.txt"}, r"none/there.txt cannot be read \(No such file"),
        ({"schedule": "1f1b", "virtual_stages": 2}, r"parallel.virtual_stages: 2, but 1f1b has 1 a stage; remove it"),
        ({"schedule": "zb-v", "virtual_stages": 3}, r"zb-v has 2 a stage"),
        ({"schedule": "cost", "placement": "fold", "virtual_stages": 3}, r"a fold has 2 chunks a stage"),
        ({"split": [12]}, r"parallel.split: \[12\] has 1 numbers; expected 2"),
        ({"split": [5, 6]}, r"adds up to 11"),
        ({"schedule": "interleaved", "virtual_stages": 7}, r"14 chunks .* need at least 14 decoder layers"),
    ],
)
def test_what_cannot_be(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(pp=2, **parallel)


def schedules(memory: float | None, modules: dict[str, ModuleSettings] | None = None) -> tuple[StepSchedules, Planner]:
    pipeline = made(pp=2, schedule="cost", modules=modules)
    options = family_modules(FAMILY, CONFIG, OptimizerSection(lr=1, modules=modules or {}))
    infos = [SampleInfo(40 * n, 10, (CONFIG.typical,) * (n % 3)) for n in range(1, 9)]
    layout = ParallelSection(pp=2).layout()
    planner = Planner.single(infos, 0, layout, BatchSection(samples=8, micro_batches=4))
    model, hardware = Model(FAMILY, CONFIG, options, "float32"), load_hardware("cpu")
    return StepSchedules(pipeline, model, layout, "none", hardware, memory, planner.info), planner


def test_cost_schedules_differ_from_step_to_step_and_are_those_of_all_ranks() -> None:
    ours, planner = schedules(None)
    found = [ours.of(planner.plan(step), 0) for step in range(4)]
    assert len(set(found)) > 1
    again, planner = schedules(None)
    assert [again.of(planner.plan(step), 0) for step in range(4)] == found
    for step, schedule in enumerate(found):
        validate(schedule, 4, buffers=1)
        assert from_text(to_text(schedule)) == schedule
        costs = ours.costs(planner.plan(step), 0)
        plain = with_vision_chunk(GENERATORS["1f1b"](2, 4))
        assert simulate(schedule, costs).makespan <= simulate(plain, costs).makespan
        assert max(simulate(schedule, costs).peak_bytes) <= max(simulate(plain, costs).peak_bytes)


def test_a_frozen_encoder_has_no_backward_in_a_step() -> None:
    ours, planner = schedules(None, FROZEN_VISION)
    schedule = ours.of(planner.plan(0), 0)
    validate(schedule, 4, frozen=1)
    assert {action.kind for actions in schedule for action in actions if action.chunk == 0} == {Kind.FORWARD}


def test_costs_are_those_of_the_planned_micro_batches() -> None:
    ours, planner = schedules(None)
    plan, layout = planner.plan(0), ParallelSection(pp=2).layout()
    micros = [[planner.info(plan.draws[i]) for i in micro.samples] for micro in plan.micro_batches[0]]
    shapes = [MicroBatchShape.of(samples, layout) for samples in micros]
    model = Model(FAMILY, CONFIG, family_modules(FAMILY, CONFIG, OptimizerSection(lr=1)), "float32")
    candidate = Candidate(layout, made(pp=2, schedule="cost").cut, "cost", "none")
    assert ours.costs(plan, 0) == prepare(model, candidate, shapes, load_hardware("cpu")).costs


def test_memory_that_nothing_fits_in() -> None:
    ours, planner = schedules(1000.0)
    with pytest.raises(UserError, match=r"stage 0.*F\d"):
        ours.of(planner.plan(0), 0)
