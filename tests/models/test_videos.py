"""What every family that takes videos must refuse, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetrascope.engine.config import DataSection
from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, MediaProcessor, get_family

WITH_VIDEOS = sorted(set(FAMILIES) - {"llava"})


def processor(name: str) -> MediaProcessor:
    family = get_family(name)
    config = next(iter(family.presets.values()))()
    return family.media(config, DataSection(train=Path("x"), tokenizer=Path("x")))


@pytest.mark.parametrize("name", WITH_VIDEOS)
@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_frame_rate_that_is_none(name: str, fps: float) -> None:
    with pytest.raises(UserError, match=r"the video's frame rate is .*, expected a positive number"):
        processor(name).video(10, fps, 640, 360)


@pytest.mark.parametrize("name", WITH_VIDEOS)
@pytest.mark.parametrize(("width", "height"), [(0, 64), (64, 0)])
def test_frames_without_pixels(name: str, width: int, height: int) -> None:
    with pytest.raises(UserError, match=rf"ha(s|ve) {width}x{height} pixels, expected"):
        processor(name).video(100, 30.0, width, height)


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_no_frames(name: str) -> None:
    with pytest.raises(UserError, match="has 0 frames, at least"):
        processor(name).video(0, 30.0, 640, 360)
