"""Micro-batches drawn for a layout: the mixture that was asked for, shared out as a run would."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.tools.plan.plans import made
from tests.tools.plan.plans import workload as for_blueprint
from tetrascope.engine.config import BatchSection
from tetrascope.errors import UserError
from tetrascope.tools.plan.workload import Mix, Workload, spread_evenly


def workload(mix: Mix, **data: object) -> Workload:
    return for_blueprint(made(**data), mix)


def test_a_mixture_is_read() -> None:
    mix = Mix.parse("4:0.3,0:0.2,1:0.5", 100, "448x224")
    assert mix.images == ((0, 0.2), (1, 0.5), (4, 0.3))
    kinds = mix.samples(made())
    # 448 x 224 pixels are 32 x 16 patches, of which four make a token.
    assert [kind.tokens for kind in kinds] == [100, 100 + 128, 100 + 4 * 128]
    assert [len(kind.media) for kind in kinds] == [0, 1, 4]


@pytest.mark.parametrize(
    ("images", "text", "size", "message"),
    [
        ("half", None, None, "--images: 'half' is not of the form COUNT:SHARE"),
        ("0:0.5,1:0.4", None, None, "add up to 0.9, expected 1"),
        ("1:0.5,1:0.5", None, None, "each count once"),
        ("-1:1", None, None, "each count once, with shares above 0"),
        (None, 0, None, "--text: expected a number of tokens of at least 1"),
        (None, None, "0x28", "--image-size: '0x28' is not of the form WIDTHxHEIGHT"),
        (None, None, "28", "--image-size"),
    ],
)
def test_a_mixture_that_cannot_be_read(images: str | None, text: int | None, size: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mix.parse(images, text, size)


def test_a_sample_longer_than_the_configuration_allows() -> None:
    with pytest.raises(
        UserError, match=r"--images: a sample with 3 pictures has 448 tokens, more than data\.max_tokens"
    ):
        workload(Mix(((0, 0.5), (3, 0.5))), max_tokens=400)


def test_draws_keep_to_their_shares_from_the_start() -> None:
    order = spread_evenly([0.2, 0.5, 0.3], 50)
    for end in (10, 20, 50):
        assert Counter(order[:end]) == {0: 0.2 * end, 1: 0.5 * end, 2: 0.3 * end}


@pytest.mark.parametrize("dp", [1, 2, 8, 16])
def test_samples_are_shared_out_over_all_ranks(dp: int) -> None:
    drawn = workload(Mix(((0, 0.5), (2, 0.5)))).micro_batches(BatchSection(samples=64, micro_batches=4), dp)
    assert len(drawn) == 4
    assert sum(map(len, drawn)) == 64 // dp
    assert abs(sum(len(info.media) for micro in drawn for info in micro) - 64 // dp) <= 4


def test_packs_are_filled_and_as_many_as_a_run_has() -> None:
    drawn = workload(Mix(((0, 0.5), (2, 0.5)))).micro_batches(BatchSection(tokens=16 * 4096, pack=2048), 8)
    assert len(drawn) == 4
    assert all(1700 <= sum(info.tokens for info in micro) <= 2048 for micro in drawn)


def test_the_rank_is_the_one_with_the_most_work() -> None:
    drawn = workload(Mix(((0, 0.75), (6, 0.25)))).micro_batches(BatchSection(samples=6, micro_batches=1), 4)
    # Two ranks have two samples, one of them with the pictures.
    assert {len(info.media) for micro in drawn for info in micro} >= {6}


def test_a_batch_that_cannot_be_shared_out() -> None:
    with pytest.raises(UserError, match="fewer samples than micro-batches, with 4 of them on each of 32 ranks"):
        workload(Mix()).micro_batches(BatchSection(samples=64, micro_batches=4), 32)
    with pytest.raises(UserError, match=r"do not divide by parallel\.dp=3"):
        workload(Mix()).micro_batches(BatchSection(tokens=8192, pack=2048), 3)


def test_the_same_draw_is_not_made_twice() -> None:
    one = workload(Mix())
    assert one.micro_batches(BatchSection(samples=64), 8) is one.micro_batches(BatchSection(samples=64), 8)


def test_no_file_is_needed() -> None:
    assert not Path("no-such-file.jsonl").exists()
    assert str(workload(Mix())) == "256 tokens of text and pictures of typical size: 100 % with 1"
