"""Images and videos that messages name: found in order, sized from headers, refused by name.

What a header promises is what a run plans for; a file that cannot keep it must be noticed, never fitted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tetrascope.engine.data.files import BadMedia, MediaFile, MediaReader, media_files
from tetrascope.errors import UserError
from tetrascope.models.layers.video_patches import VideoPatches
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.tools.verify.families.qwen2_vl import tiny_config

OPTIONS = DefaultMediaOptions(min_pixels=784, fps=1.0, min_frames=2, max_frames=6, video_max_pixels=56 * 56)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (13, 200)).save(tmp_path / "thin.png")
    return tmp_path


def reader(options: DefaultMediaOptions = OPTIONS) -> MediaReader:
    config = tiny_config()
    return MediaReader(FAMILY.media(config, options), config.vision.patch, options.min_frames)


def frames(folder: Path, count: int, fps: float = 1.0) -> MediaFile:
    return MediaFile("video", tuple(folder / f"{i}.png" for i in range(count)), fps)


def test_files_are_found_in_order_whatever_part_holds_them(tmp_path: Path) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "words"},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4"}]},
        {"role": "assistant", "content": [{"type": "result", "image": "c.png"}, {"type": "text", "text": "image"}]},
        {"role": "user", "content": [{"type": "video", "video": ["d.png", "e.png"], "fps": 4}]},
    ]
    found = media_files(messages, tmp_path)
    assert [(file.kind, [path.name for path in file.paths], file.fps) for file in found] == [
        ("image", ["a.png"], 1.0),
        ("video", ["b.mp4"], 1.0),
        ("image", ["c.png"], 1.0),
        ("video", ["d.png", "e.png"], 4.0),
    ]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, '"image" is None; expected the path of a file'),
        ({"type": "image", "image": ["a.png"]}, "\"image\" is .'a.png'.; expected the path"),
        ({"type": "video", "video": []}, '"video" is ..; expected the path'),
        ({"type": "video", "video": ["a.png", 3]}, "expected the path of a file"),
        ({"type": "video", "video": ["a.png"], "fps": 0}, '"fps" is 0; expected how many'),
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, part: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        media_files([{"role": "user", "content": [part]}], tmp_path)


def test_a_video_is_planned_from_its_header_and_read_as_planned(folder: Path) -> None:
    file = frames(folder, 9)
    (media,) = reader().describe([file])
    # Nine seconds at one frame a second, at most six, evenly from the first to the last; 90x60 pixels fit 3,136 as
    # 56x28: three pairs of frames of 2x4 patches.
    assert media.kind == "video" and media.numbers == (0, 2, 3, 5, 6, 8)
    assert media.times == (0.0, 3.0, 6.0)
    assert media.grid == (3, 2, 4) and media.frames == (8, 8, 8) and media.tokens == 6
    pictures = [Image.open(folder / f"{i}.png").convert("RGB") for i in media.numbers]
    patches = VideoPatches(max_pixels=56 * 56, min_pixels=56 * 56, total_pixels=24576 * 784).patches(pictures)
    rows = reader().rows(file, media)
    assert rows.shape == (media.patches, 1176) and np.array_equal(rows, patches)


def test_what_cannot_be_used_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"image .*thin\.png has 13x200 pixels, less than .* patches of 14x14"):
        reader().describe([MediaFile("image", (folder / "thin.png",))])
    with pytest.raises(UserError, match="has 3 frames, at least 4 are needed"):
        reader(DefaultMediaOptions(min_frames=4)).describe([frames(folder, 3)])
    with pytest.raises(UserError, match=r"image .*none\.png does not exist"):
        reader().describe([MediaFile("image", (folder / "none.png",))])


def test_a_video_that_changes_under_the_run_is_bad(folder: Path) -> None:
    file = frames(folder, 4)
    (media,) = reader().describe([file])
    Image.new("RGB", (30, 30)).save(folder / "3.png")
    with pytest.raises(BadMedia, match=r"video .*0\.png"):
        reader().rows(file, media)
    (folder / "0.png").unlink()
    with pytest.raises(BadMedia, match=r"video .*0\.png"):
        reader().rows(file, media)
