"""Costs of samples against the FLOP counts, which tests/engine/test_family_flops.py compares with torch's counter."""

from __future__ import annotations

import pytest

from tests.engine.plan.samples import image
from tetrascope.engine.flops import training_flops
from tetrascope.engine.modules import Trained
from tetrascope.engine.plan import CostModel, SampleInfo, row_cost
from tetrascope.models.family import get_family

SAMPLES = [
    SampleInfo(500, 9, ()),
    SampleInfo(900, 9, (image(8, 20),)),
    SampleInfo(300, 9, (image(4, 6), image(8, 8, 3))),
]
ADAPTOR_ALONE = Trained(vision=False, adaptor=True, language=False, embeddings=False)


@pytest.mark.parametrize("trained", [Trained(True, True, True, True), ADAPTOR_ALONE])
def test_samples_add_up_to_the_cost_of_their_pack(trained: Trained) -> None:
    config = get_family("qwen2_vl").presets["7b"]()
    costs = [CostModel(config, trained)(info) for info in SAMPLES]
    media = [one for info in SAMPLES for one in info.media]
    vision, decoder = training_flops(config, media, [info.tokens for info in SAMPLES], trained)
    assert sum(cost.vision for cost in costs) == pytest.approx(vision, rel=1e-12)
    assert sum(cost.decoder for cost in costs) == pytest.approx(decoder, rel=1e-12)
    assert costs[0].vision == 0


def test_what_is_frozen_costs_less() -> None:
    config = get_family("qwen2_vl").presets["7b"]()
    whole, part = (CostModel(config, *options)(SAMPLES[1]) for options in ((), (ADAPTOR_ALONE,)))
    assert 2.5 < whole.vision / part.vision <= 3 and whole.decoder > part.decoder


def test_attention_grows_with_the_square_of_a_document() -> None:
    model = CostModel(get_family("qwen2_vl").presets["7b"]())
    one, two, four = (model(SampleInfo(n * 10_000, 9, ())).decoder for n in (1, 2, 4))
    assert two > 2.05 * one and four - 2 * two > 3.9 * (two - 2 * one)


def test_rows_without_a_model() -> None:
    info = SAMPLES[2]
    assert info.patches == 24 + 3 * 64
    assert row_cost(info) == (300, 216)
