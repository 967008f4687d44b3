"""The parts of forward and backward add up to `training_flops`, whatever is trained."""

from __future__ import annotations

from itertools import product

import pytest

from tetrascope.engine import flops
from tetrascope.engine.modules import Trained
from tetrascope.models.family import FAMILIES, get_family


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("flags", list(product([False, True], repeat=4)), ids=str)
def test_parts_add_up(name: str, flags: tuple[bool, bool, bool, bool]) -> None:
    config, trained = next(iter(get_family(name).presets.values()))(), Trained(*flags)
    media, documents = [config.typical] * 3, (17, 300)
    below = trained.vision or trained.adaptor or trained.embeddings
    vision = flops.vision_work(config, media, trained)
    layer = flops.layer_work(config, documents, trained.language, below)
    head = flops.head_work(config, sum(documents), trained.embeddings, below or trained.language)
    expected = flops.training_flops(config, media, documents, trained)
    assert sum(map(sum, vision)) == pytest.approx(expected[0], rel=1e-12)
    language = config.decoder.layers * sum(map(sum, layer)) + sum(map(sum, head))
    assert language == pytest.approx(expected[1], rel=1e-12)
    assert sum(vision.forward) == pytest.approx(flops.vision_forward(config, media), rel=1e-12)
