"""The search: its bounds hold, so that what it does not simulate cannot be better; and what it says of its choices."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.tools.plan.plans import hardware, made, raw, workload
from tetrascope.engine.config import BatchSection, Config
from tetrascope.engine.config_file import validated
from tetrascope.engine.flops import training_flops
from tetrascope.engine.predict import predict, prepare
from tetrascope.engine.setup import blueprint
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import Layout
from tetrascope.tools.plan import search as search_module
from tetrascope.tools.plan.choices import COLUMNS, cut, left_out, row, settings
from tetrascope.tools.plan.search import PROMISE, Found, Outcome, search
from tetrascope.tools.plan.space import FIXED
from tetrascope.tools.plan.variants import Weighed, Weights, schedule_of
from tetrascope.tools.plan.workload import Mix

MIX = Mix(((0, 0.25), (1, 0.5), (4, 0.25)), size=(448, 448))


def weights(**options: Any) -> Weights:
    one = made()
    return Weights(one, hardware(**options), workload(one, MIX))


def weighed(which: Weights, layout: Layout, number: int, micro_batches: int = 8) -> list[Weighed]:
    """The variants of a layout under a schedule."""
    samples = workload(made(), MIX).micro_batches(BatchSection(samples=64, micro_batches=micro_batches), layout.dp)
    variants = which.variants(layout, BatchSection(samples=64, micro_batches=micro_batches), samples)
    return [which.weigh(variant, FIXED[number]) for variant in variants]


def exact(which: Weights, one: Weighed) -> Found:
    shapes = one.variant.micro_batches()
    prepared = prepare(which.model, one.candidate, shapes, which.hardware)
    prediction = predict(which.model, one.candidate, shapes, which.hardware, schedule_of, prepared=prepared)
    return Found(one.variant, one.pipelining, prediction, prepared.costs, min(prepared.caps))


@pytest.mark.parametrize("number", range(len(FIXED)), ids=[str(one) for one in FIXED])
@pytest.mark.parametrize("layout", [Layout(pp=2, dp=2), Layout(pp=4, tp=2)], ids=str)
def test_no_schedule_is_faster_than_its_bounds(layout: Layout, number: int) -> None:
    which = weights()
    for one in weighed(which, layout, number):
        seconds = exact(which, one).seconds
        assert one.bound <= seconds * (1 + 1e-9)
        assert one.ideal <= seconds
        assert one.bound > 0.7 * seconds, "the bound of a plain pipeline is not far from it"


@pytest.mark.parametrize("number", range(len(FIXED)), ids=[str(one) for one in FIXED])
def test_a_long_step_is_estimated_by_part_of_it(number: int) -> None:
    # Half of the micro-batches. They are unequal, and with one chunk a stage their order matters most.
    which = weights()
    for one in weighed(which, Layout(pp=2), number, micro_batches=32):
        assert len(one.variant.some) == 16 and one.variant.scale == pytest.approx(2, rel=0.2)
        assert one.estimate()[0] == pytest.approx(exact(which, one).seconds, rel=0.05)


def test_a_row_of_the_table_is_what_a_hand_computes() -> None:
    # Two stages, equal micro-batches, transfers that take no time: the second stage, the busier one, works without a
    # pause from the first forward that reaches it to its last backward, T = F0 + m·(F1 + B1) + B0.
    one = made()
    machine = hardware(latency=0.0, bandwidth=1e30)
    which = Weights(one, machine, workload(one))
    batch = BatchSection(samples=16, micro_batches=8)
    variant = which.variants(Layout(pp=2), batch, workload(one).micro_batches(batch, 1))[0]
    found = exact(which, which.weigh(variant, FIXED[0], [10, 18]))
    costs, m = found.costs, 8
    forward = [costs.forward[stage][0] for stage in (0, 1)]
    backward = [costs.backward_input[stage][0] + costs.backward_weight[stage][0] for stage in (0, 1)]
    makespan = forward[0] + m * (forward[1] + backward[1]) + backward[0]
    tail = sum(found.prediction.breakdown[part] for part in ("gradient reduction", "parameter gather"))
    assert tail < 1e-9 and found.prediction.timeline.makespan == pytest.approx(makespan)
    seconds = found.seconds
    assert makespan < seconds < 1.2 * makespan, "what is left is the optimizer"

    media = one.model_config.typical
    tokens = 16 * (256 + media.tokens)
    flops = sum(training_flops(one.model_config, [media] * 16, [256 + media.tokens] * 16))
    bubble = 1 - m * (sum(forward) + sum(backward)) / (2 * makespan)
    assert dict(zip(COLUMNS, row(3, found), strict=True)) == {
        "": "3",
        "layout": "PP2",
        "schedule": "1f1b",
        "layers": "10 18",
        "micro-batches": "8 of 2 samples",
        "recompute": "none",
        "step, s": f"{seconds:.3f}",
        "tokens/s/GPU": f"{tokens / seconds / 2:,.0f}",
        "MFU, %": f"{100 * flops / (seconds * 2 * 1e15):.1f}",
        "bubble, %": f"{100 * bubble:.1f}",
        "peak, GiB": f"{max(found.prediction.peak_bytes) / 2**30:.1f}",
    }


def test_the_search_finds_what_trying_everything_finds() -> None:
    one = made(batch={"samples": 16, "micro_batches": 2})
    which = Weights(one, hardware(), workload(one, MIX))
    outcome = search(one, 4, hardware(), workload(one, MIX), top=3, refined=0)
    searching = search_module._Search(one, hardware(), workload(one, MIX))
    every: dict[int, float] = {}
    variants = [variant for _, variant in searching._variants(4)]
    for number, variant in enumerate(variants):
        for each in searching._schedules(variant):
            every[number] = min(exact(which, each).seconds, every.get(number, float("inf")))
    best = sorted(every.values())[:3]
    assert [found.seconds for found in outcome.ranked] == pytest.approx(best, rel=1 - PROMISE)
    assert outcome.simulated < len(variants), "most need not be simulated"
    assert outcome.slower > 0


def test_a_better_cut_and_schedule_are_no_slower() -> None:
    one = made(batch={"samples": 16, "micro_batches": 4})
    plain = search(one, 4, hardware(), workload(one, MIX), top=2, refined=0)
    refined = search(one, 4, hardware(), workload(one, MIX), top=2, refined=2)
    assert refined.ranked[0].seconds <= plain.ranked[0].seconds
    assert refined.ranked == sorted(refined.ranked, key=lambda found: found.seconds)


def test_the_largest_search_simulates_few_of_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made("72b", {"samples": 16, "micro_batches": 2})
    monkeypatch.setattr(search_module, "MOST", 30)
    monkeypatch.setattr(search_module, "FIXED", FIXED[:2])
    outcome = search(one, 1024, hardware(), workload(one, MIX), top=2, refined=0)
    assert [found.variant.layout.world for found in outcome.ranked] == [1024, 1024]
    assert outcome.simulated <= 30 + 2, "each takes tens of milliseconds"
    assert outcome.slower + len(outcome.excess) > 200


def test_every_choice_can_be_configured() -> None:
    one = made(batch={"tokens": 65536, "pack": 2048})
    outcome = search(one, 8, hardware(memory=30e9), workload(one, MIX), top=5, refined=2)
    assert len(outcome.ranked) == 5
    for found in outcome.ranked:
        chosen = yaml.safe_load(settings(found, "h100-sxm"))
        base = raw(batch={"tokens": 65536, "pack": 2048})
        config = validated(Config, {**base, **chosen, "train": {**base["train"], **chosen["train"]}}, "chosen")
        built = blueprint(config, 8)
        assert built.layout == found.variant.layout
        assert built.pipeline.cut == found.prediction.candidate.cut
        assert built.config.train.recompute == found.variant.recompute
        if built.pipeline.schedule is not None:
            assert built.pipeline.schedule == found.prediction.schedule


def test_what_does_not_fit_is_told_with_the_closest() -> None:
    one = made()
    with pytest.raises(
        UserError, match=r"--gpus 2 --hardware round: nothing fits in memory; the closest is .*stage \d"
    ):
        search(one, 2, hardware(memory=4e9), workload(one), top=3)
    outcome = search(one, 8, hardware(memory=16e9), workload(one, MIX), top=3, refined=0)
    assert all(max(found.prediction.peak_bytes) <= 16e9 for found in outcome.ranked)
    excess = [each.needed - each.capacity for each in outcome.excess]
    assert excess == sorted(excess) and excess[0] > 0
    assert "do not fit in memory; the closest is" in left_out(outcome)[0]


def test_what_the_model_cannot_be_is_told_once() -> None:
    one = made()
    outcome = search(one, 8, hardware(), workload(one), top=1, refined=0)
    told = [line for line in left_out(outcome) if "key/value heads do not divide by tp=" in line]
    assert len(told) == 1 and "TP4" in told[0]


def test_no_layout_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("parallel: not this model")

    monkeypatch.setattr(search_module, "check_layout", refuse)
    one = made()
    with pytest.raises(UserError, match="no layout is possible: parallel: not this model"):
        search(one, 2, hardware(), workload(one), top=1)
    with pytest.raises(UserError, match="--gpus: expected a number of at least 1, not 0"):
        search(one, 0, hardware(), workload(one), top=1)


def test_reasons_that_differ_in_numbers_are_one() -> None:
    outcome = Outcome()
    for number in (3, 14, 5):
        outcome.reject(f"tp={number} is too much", f"TP{number}")
    outcome.reject("something else", "PP2")
    assert left_out(outcome) == ["TP3 and 2 others: tp=3 is too much", "PP2: something else"]


@pytest.mark.parametrize(("counts", "text"), [((4,), "4"), ((3, 5, 5, 5, 4), "3 5×3 4")])
def test_cuts_in_short(counts: tuple[int, ...], text: str) -> None:
    assert cut(counts) == text
