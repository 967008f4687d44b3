"""Predictions against sums by hand, and what must hold of every one of them.

The hardware here has round figures, so that each term of a small case can be written out: a mistake in a formula's
shape (a share, a direction, a count) gives another number, not a slightly different one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tetrascope.engine import flops
from tetrascope.engine.config import ModuleSettings, OptimizerSection
from tetrascope.engine.modules import family_modules
from tetrascope.engine.plan import SampleInfo
from tetrascope.engine.predict import (
    Candidate,
    Hardware,
    Link,
    MicroBatchShape,
    Model,
    load_hardware,
    parts,
    predict,
    prepare,
)
from tetrascope.engine.predict.costs import Cost
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.placement import loop
from tetrascope.parallel.pipeline.simulator import Costs, simulate
from tetrascope.parallel.pipeline.validator import validate

NOTHING = Link(latency=0.0, bandwidth=1e30)
PURE = Hardware(8, 1e15, {"float32": 1e12, "bfloat16": 1e12}, 1.0, 1.0, 1e30, NOTHING, NOTHING, 0.0)
"""Nothing takes time but matrix products: a TFLOP a second."""


def model(name: str = "qwen2_vl", dtype: str = "bfloat16", layers: int = 8, **frozen: bool) -> Model:
    family = get_family(name)
    config: Any = family.presets["2b"]()
    config = replace(config, decoder=replace(config.decoder, layers=layers, tied_embeddings=False))
    settings = {module: ModuleSettings(frozen=True) for module in frozen}
    return Model(family, config, family_modules(family, config, OptimizerSection(lr=1e-3, modules=settings)), dtype)


def micro_batches(of: Model, images: Sequence[int] = (0, 2, 5, 1), tokens: int = 900) -> list[MicroBatchShape]:
    media = of.config.typical
    return [MicroBatchShape.of([SampleInfo(tokens, 5, (media,) * n), SampleInfo(100, 5, ())], Layout()) for n in images]


def test_matrix_products_alone() -> None:
    """One rank, no memory traffic: the model's FLOPs, and a quarter more of attention's backward."""
    m = model()
    micros = micro_batches(m)
    found = predict(m, Candidate(Layout(), Cut.of((0,), (8,)), "gpipe"), micros, PURE)
    attention = sum(
        2 * flops.vision_work(m.config, one.media).forward.attention
        + 8 * 2 * flops.layer_work(m.config, one.documents).forward.attention
        for one in micros
    )
    assert found.seconds == pytest.approx((m.flops(micros) + 0.25 * attention) / 1e12, rel=1e-9)
    assert found.mfu == pytest.approx(m.flops(micros) / 1e12 / found.seconds)
    assert found.tokens_per_second_per_gpu == pytest.approx(4000 / found.seconds)
    again = predict(m, Candidate(Layout(), Cut.of((0,), (8,)), "gpipe", "full"), micros, PURE)
    forward = sum(
        sum(flops.vision_work(m.config, one.media).forward) * bool(one.media)
        + 8 * sum(flops.layer_work(m.config, one.documents).forward)
        for one in micros
    )
    assert again.seconds - found.seconds == pytest.approx(forward / 1e12, rel=1e-9)
    assert again.mfu == pytest.approx(m.flops(micros) / 1e12 / again.seconds), "recomputing is no work of the model"
    assert max(again.timeline.peak_bytes) < max(found.timeline.peak_bytes) / 2


def test_collectives_of_a_layer() -> None:
    """Tensor parallelism of 4 with sequence parallelism: four collectives of the hidden states each way."""
    m = model()
    micro = MicroBatchShape((1000,), (), 1000)
    link = Link(latency=1e-3, bandwidth=1e6)
    machine = replace(PURE, intra_node=link, gpus_per_node=4)
    found = parts(m, Layout(tp=4), "none", [micro], machine)
    cost = Cost(*found.costs[found.kinds.index((True, True)), 0])
    hidden = 1000 * 1536 * 2
    assert cost.tensor_forward == cost.tensor_backward == pytest.approx(4 * 3 * (1e-3 + hidden / 4 / 1e6))
    outside = parts(m, Layout(tp=4), "none", [micro], replace(machine, gpus_per_node=2))
    assert Cost(*outside.costs[found.kinds.index((True, True)), 0]).tensor_forward < 1e-9, "the other link"
    # The products of a rank are a quarter, and so are what crosses to the next stage.
    alone = parts(m, Layout(), "none", [micro], PURE)
    whole = Cost(*alone.costs[alone.kinds.index((True, True)), 0])
    assert cost.forward == pytest.approx(whole.forward / 4)
    assert found.border == (hidden / 4,) and alone.border == (hidden,)


def test_context_parallelism() -> None:
    """Bytes by the formulas of the spec; d = 1536, two key/value heads of 128, bf16."""
    m = model()
    micro = MicroBatchShape((1024,), (), 1024)
    slow = replace(PURE, intra_node=Link(0.0, 1e6), peak_flops={"bfloat16": 1e30}, gpus_per_node=64)

    def cost(layout: Layout) -> Cost:
        found = parts(m, layout, "none", [micro], slow)
        return Cost(*found.costs[found.kinds.index((True, True)), 0])

    ulysses = cost(Layout(ulysses=2))
    size = 1 / 2 * 512 * (2 * 1536 + 2 * 256) * 2
    assert ulysses.context_forward == ulysses.context_backward == pytest.approx(size / 1e6)
    assert cost(Layout(ulysses=4)).context_forward == pytest.approx(3 / 4 * 256 * (2 * 1536 + 2 * 512) * 2 / 1e6)
    ring = cost(Layout(ring=4))
    block = 256 * 2 * 256
    assert ring.context_forward == pytest.approx(3 * block * 2 / 1e6)
    assert ring.context_backward == pytest.approx((3 * block * 2 + 4 * block * 4) / 1e6)
    both = cost(Layout(ring=2, ulysses=2))
    expected = 1 / 2 * 256 * (2 * 1536 + 2 * 256) * 2 + 512 * 2 * 256 / 2 * 2
    assert both.context_forward == pytest.approx(expected / 1e6)


def test_gradients_and_parameters_travel_once() -> None:
    """Data parallelism of 4 over a slow link: 3/4 of the fp32 gradients, then 3/4 of the bf16 parameters."""
    m = model()
    micros = micro_batches(m)
    cut = Cut.of((0,), (8,))
    base = predict(m, Candidate(Layout(), cut, "gpipe"), micros, PURE)
    machine = replace(PURE, intra_node=Link(0.0, 1e9))
    found = predict(m, Candidate(Layout(dp=4), cut, "gpipe"), micros, machine)
    size = found.memory[0].gradient_bytes
    assert found.breakdown["gradient reduction"] == pytest.approx(3 / 4 * size / 1e9)
    assert found.breakdown["parameter gather"] == pytest.approx(3 / 4 * size / 2 / 1e9)
    assert found.seconds == pytest.approx(base.seconds + 3 / 4 * size * 1.5 / 1e9)
    assert found.mfu == pytest.approx(base.mfu * base.seconds / found.seconds)


def test_closed_form_of_the_bubble() -> None:
    """Stages of equal cost (text only, and a head of one row, 1e-5 of a layer): (p − 1)/(m + p − 1)."""
    m = model()
    m.config = replace(m.config, decoder=replace(m.config.decoder, vocab=1))
    micros = [MicroBatchShape((1000,), (), 1000)] * 12
    found = predict(m, Candidate(Layout(pp=4), Cut.of(loop(4), (2,) * 4), "1f1b"), micros, PURE)
    assert found.timeline.bubble_share == pytest.approx(3 / 15, rel=1e-3)


@pytest.mark.parametrize("vision_chunk", [False, True])
@pytest.mark.parametrize("frozen", [{}, {"vision": True}, {"vision": True, "adaptor": True, "embeddings": True}])
@pytest.mark.parametrize("schedule", sorted(GENERATORS))
def test_every_schedule(schedule: str, frozen: dict[str, bool], vision_chunk: bool) -> None:
    m = model(**frozen)
    micros = micro_batches(m, (0, 3, 1, 4, 2))
    generator = GENERATORS[schedule]
    placement = generator.place(2, generator.virtual_stages)
    cut = Cut.of(placement, (8 // len(placement),) * len(placement), vision_chunk)
    machine = load_hardware("h100-sxm")
    candidate = Candidate(Layout(pp=2, dp=4, tp=2), cut, schedule)
    ready = prepare(m, candidate, micros, machine)
    found = predict(m, candidate, micros, machine, prepared=ready)
    validate(found.schedule, 5, frozen=ready.frozen)
    assert ready.frozen == (1 if vision_chunk and "adaptor" in frozen else 0)
    if ready.frozen:  # kept till the next chunk has run: visual tokens, half of them on each tensor-parallel rank
        visual = [sum(one.tokens for one in micro.media) * 1536 for micro in micros]
        assert ready.costs.activation_bytes is not None and ready.costs.activation_bytes[0] == visual
    assert sum(found.breakdown.values()) == pytest.approx(found.seconds)
    assert min(found.breakdown.values()) >= 0
    assert ready.bound - 1e-9 <= found.seconds <= ready.seconds(found.timeline.makespan) + 1e-9
    for peak, cap, held in zip(found.timeline.peak_bytes, ready.caps, found.peak_bytes, strict=True):
        assert held == pytest.approx(machine.memory_bytes - cap + peak)
    assert found.fits
    tight = replace(machine, memory_bytes=max(found.peak_bytes) - 1)
    assert not predict(m, candidate, micros, tight).fits
    learned = predict(model(), Candidate(candidate.layout, cut, schedule), micros, machine)
    assert (found.seconds < learned.seconds) == bool(frozen)


def test_a_schedule_of_ones_own() -> None:
    m = model()
    micros = micro_batches(m)
    machine = load_hardware("h100-sxm")
    seen: list[Any] = []

    def of(candidate: Candidate, count: int, costs: Costs, caps: Sequence[float], frozen: int) -> Schedule:
        seen.append((candidate, count, caps, frozen))
        return GENERATORS["gpipe"](2, count)

    candidate = Candidate(Layout(pp=2), Cut.of(loop(2), (4, 4)), "mine")
    found = predict(m, candidate, micros, machine, of)
    ready = prepare(m, candidate, micros, machine, parts(m, candidate.layout, "none", micros, machine))
    assert seen == [(candidate, 4, ready.caps, 0)]
    assert found.timeline == simulate(GENERATORS["gpipe"](2, 4), ready.costs)
    with pytest.raises(UserError, match=r"parallel\.schedule: no generator is called 'mine'; choose one of gpipe, 1f"):
        predict(m, candidate, micros, machine)


def test_where_the_vision_encoder_counts() -> None:
    m = model()
    micros = micro_batches(m)
    one, two = (
        prepare(m, Candidate(Layout(pp=2), cut, "1f1b"), micros, PURE)
        for cut in (Cut.of(loop(2), (4, 4)), Cut.of(loop(2), (4, 4), vision_chunk=True))
    )
    assert len(two.costs.forward) == 3
    for table in ("forward", "backward_input", "backward_weight", "activation_bytes"):
        merged, apart = getattr(one.costs, table), getattr(two.costs, table)
        assert [a + b for a, b in zip(apart[0], apart[1], strict=True)] == pytest.approx(merged[0])
        assert apart[2] == merged[1]
        assert apart[0][0] == 0, "text only"
    assert one.bound == two.bound
    assert one.static == two.static


def test_padding_costs_time_but_is_no_work() -> None:
    m = model()
    infos = [SampleInfo(1001, 5, ())]
    micro = MicroBatchShape.of(infos, Layout(tp=8, ring=2))
    assert (micro.tokens, micro.rows, micro.packed) == (1001, 1008, (1001, 7))
    assert m.flops([micro]) == m.flops([MicroBatchShape.of(infos, Layout())])


def test_fast_enough_to_search() -> None:
    """16 stages, 64 unequal micro-batches: some milliseconds, given the parts; the bound is ample, for busy days."""
    m = model(layers=32)
    micros = [micro_batches(m, (i % 7,), 900 + i)[0] for i in range(64)]
    machine = load_hardware("h100-sxm")
    known = parts(m, Layout(pp=16), "none", micros, machine)
    start = time.process_time()
    prepare(m, Candidate(Layout(pp=16), Cut.of(loop(16), (2,) * 16), "1f1b"), micros, machine, known)
    assert time.process_time() - start < 0.1
