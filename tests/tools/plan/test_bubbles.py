"""The comparison with pipelines cut by hand: its mixtures are what they are said to be, and its table's figures."""

from __future__ import annotations

import numpy as np
import pytest

from tetrascope.engine.predict import load_hardware
from tetrascope.tools.plan.bubbles import Case, Study, by_hand, cases, even, internvl_samples, qwen_samples


def test_documents_have_the_pictures_and_text_of_the_published_data() -> None:
    infos = qwen_samples(np.random.default_rng(0), 4000)
    pictures = np.array([len(info.media) for info in infos])
    text = np.array([info.tokens - sum(one.tokens for one in info.media) for info in infos])
    assert np.mean(pictures == 0) == pytest.approx(0.15, abs=0.02)
    # 353 / 141 = 2.5 before the limit of six.
    assert pictures.max() == 6 and 2.1 < pictures[pictures > 0].mean() < 2.5
    assert 700 < text.mean() < 830 and text.max() <= 2048


def test_instructions_have_one_to_twelve_tiles_and_a_thumbnail() -> None:
    infos = internvl_samples(np.random.default_rng(0), 2000)
    tiles = [len(one.frames) for info in infos for one in info.media]
    assert min(tiles) == 1 and max(tiles) == 13 and 2 not in tiles
    assert {info.media[0].frames[0] for info in infos if info.media} == {1025}


def test_cuts_by_hand() -> None:
    assert even(48, 5) == [10, 10, 10, 9, 9]
    assert by_hand(80, 4, 0) == [20, 20, 20, 20]
    assert by_hand(80, 4, 4) == [16, 22, 21, 21]


def test_every_line_is_there_once() -> None:
    lines = cases()
    assert len(lines) == len(set(lines)) == 16


def test_cut_and_schedule_from_costs_are_no_worse_than_the_hand() -> None:
    study = Study(Case("qwen2_vl", 4, vision_trained=True, planned=True), load_hardware("h100-sxm"))
    assert len(study.shapes) == 16 and all(shape.rows <= 8192 for shape in study.shapes)
    found = study.bubbles(effort=0)
    assert found.limit <= found.best <= found.single <= found.hand <= found.equal
