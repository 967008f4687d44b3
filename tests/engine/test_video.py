"""Frame k is frame k.

Every test video is written here, each frame carrying its number as brightness, so that a frame off by one, in stored
instead of shown order, or from the wrong side of a seek shows. Containers are chosen for what they lack: Matroska has
no frame count, raw streams and AVI no (right) presentation times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tetrascope.engine.data import video
from tetrascope.engine.data.video import BadVideo, VideoInfo, decode, probe
from tetrascope.errors import UserError

STEP = 4  # of brightness between frames; coding at the best quality costs at most 2


def packets(n: int, codec: str, container: av.container.OutputContainer, b_frames: int = 2) -> list[av.Packet]:
    stream = container.add_stream(codec, rate=25)
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    stream.bit_rate = 8_000_000
    stream.codec_context.gop_size = 8
    if b_frames:
        stream.codec_context.max_b_frames = b_frames
    if codec == "mpeg4":
        stream.codec_context.qmax = 2  # otherwise frames so alike are coded as equal
    out = []
    for number in range(n):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + STEP * number, np.uint8), format="rgb24")
        frame.pts = number
        out += stream.encode(frame)
    return out + list(stream.encode(None))


def write(path: Path, n: int, codec: str, b_frames: int = 2) -> Path:
    with av.open(str(path), "w") as container:
        for packet in packets(n, codec, container, b_frames):
            container.mux(packet)
    return path


def numbers_in(images: list[Image.Image]) -> list[int]:
    return [round((float(np.asarray(image).mean()) - 20) / STEP) for image in images]


FILES = [("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")]
FILES += [("a.avi", "libx264"), ("a.h264", "libx264"), ("a.webm", "libvpx-vp9")]


@pytest.mark.parametrize(("name", "codec"), FILES)
def test_frame_k_is_frame_k(tmp_path: Path, name: str, codec: str) -> None:
    path = write(tmp_path / name, 40, codec, b_frames=0 if "vp9" in codec else 2)
    assert probe(path) == VideoInfo(frames=40, fps=25.0, width=64, height=48, seconds=1.6)
    # All in one go, single frames, around key frames (every 8th), and with repeats.
    for wanted in [list(range(40)), [0], [39], [7], [8], [9], [3, 17, 18, 33], [0, 0, 16, 16, 39, 39], [15, 31]]:
        images = decode(path, wanted)
        assert numbers_in(images) == wanted
        assert all(image.mode == "RGB" and image.size == (64, 48) for image in images)


def test_the_stored_order_differs(tmp_path: Path) -> None:
    # Without B-frames the tests above would not tell shown order from stored order.
    with av.open(str(write(tmp_path / "a.mp4", 12, "libx264"))) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert times != sorted(times)


def test_seeking_saves_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", 48, "libx264")
    seeks: list[int] = []
    decoded: list[int] = []
    plain: Callable = video._open

    class Counting:
        """The container, with its seeks and decoded frames noted."""

        def __init__(self, container: av.container.InputContainer) -> None:
            self.container, self.demux = container, container.demux

        def decode(self, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
            for frame in self.container.decode(stream):
                decoded.append(1)
                yield frame

        def seek(self, time: int, **options: object) -> None:
            seeks.append(time)
            self.container.seek(time, **options)  # type: ignore[arg-type]

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

    def counting(source: video.Source) -> tuple[Counting, av.VideoStream]:
        container, stream = plain(source)
        return Counting(container), stream

    monkeypatch.setattr(video, "_open", counting)
    assert numbers_in(decode(path, [0, 1, 2, 9])) == [0, 1, 2, 9]
    assert len(seeks) == 1 and len(decoded) == 3 + 2
    seeks.clear()
    decoded.clear()
    assert numbers_in(decode(path, [45, 46])) == [45, 46]
    assert len(seeks) == 1 and len(decoded) == 7  # 40 is the key frame; near each other, so no second seek


def test_frames_cut_off_by_an_edit_list_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w") as container:
        for packet in packets(20, "libx264", container):
            three = int(3 / 25 / packet.time_base)
            packet.pts, packet.dts = (packet.pts or 0) - three, (packet.dts or 0) - three
            container.mux(packet)
    assert probe(path).frames == 17
    assert numbers_in(decode(path, range(17))) == list(range(3, 20))
    assert numbers_in(decode(path, [2, 16])) == [5, 19]


def write_hidden(path: Path) -> Path:
    """Ten frames of VP8 of which number 4 is marked as not shown."""
    with av.open(str(path), "w") as container:
        for number, packet in enumerate(packets(10, "libvpx", container, b_frames=0)):
            content = bytearray(bytes(packet))
            if number == 4:
                content[0] &= ~0x10  # show_frame
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream, copy.is_keyframe = packet.stream, packet.is_keyframe
            container.mux(copy)
    return path


def test_vp8_frames_that_are_never_shown_do_not_count(tmp_path: Path) -> None:
    path = write_hidden(tmp_path / "hidden.webm")
    assert probe(path).frames == 9
    assert numbers_in(decode(path, range(9))) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_frame_that_the_decoder_swallows_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hidden frame again, this time counted as if it should be shown: what comes after it must not move up by one.
    path = write_hidden(tmp_path / "hidden.webm")

    def all_packets(container: av.container.InputContainer, stream: av.VideoStream) -> list[tuple[int | None, bool]]:
        return [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]

    monkeypatch.setattr(video, "_shown_packets", all_packets)
    assert numbers_in(decode(path, [0, 3])) == [0, 3]
    with pytest.raises(BadVideo, match=r"hidden\.webm is damaged: only 9 of its 10 frames"):
        decode(path, [3, 6])


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        for packet in packets(20, "libx264", container):
            packet.pts, packet.dts = (packet.pts or 0) ** 2, None
            container.mux(packet)
    assert probe(path).frames == 20
    assert numbers_in(decode(path, [0, 7, 11, 19])) == [0, 7, 11, 19]


# --- pictures as a video


def pictures(folder: Path, n: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"frame{number}.png" for number in range(n)]
    for number, path in enumerate(paths):
        Image.new("L", (30, 20), 20 + STEP * number).save(path)
    return paths


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "clip", 12)
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    assert probe(tmp_path / "clip", fps=2.0) == VideoInfo(frames=12, fps=2.0, width=30, height=20, seconds=6.0)
    # frame10 comes after frame9, not after frame1.
    assert numbers_in(decode(tmp_path / "clip", [1, 2, 2, 10])) == [1, 2, 2, 10]


def test_a_list_of_pictures_keeps_its_order(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "clip", 5)[::-1]
    assert probe(paths).fps == 1.0
    assert numbers_in(decode([str(path) for path in paths], [0, 3])) == [4, 1]


# --- errors


def test_unreadable_videos_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot read video .*gone\.mp4"):
        probe(tmp_path / "gone.mp4")
    with pytest.raises(UserError, match=r"cannot read video .*noise\.mp4"):
        probe(tmp_path / "noise.mp4")
    with pytest.raises(UserError, match=r"empty has no pictures"):
        probe(tmp_path / "empty")
    with pytest.raises(UserError, match=r"frame .*gone\.png does not exist"):
        probe([*pictures(tmp_path / "clip", 1), tmp_path / "gone.png"])
    with pytest.raises(UserError, match="fps is 0"):
        probe(tmp_path / "clip", fps=0)
    with pytest.raises(BadVideo, match=r"gone\.mp4"):
        decode(tmp_path / "gone.mp4", [0])


def test_sound_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(UserError, match=r"a\.wav has no video stream"):
        probe(path)


def test_too_few_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "short.mp4", 3, "libx264")
    assert probe(path, at_least=3).frames == 3
    with pytest.raises(UserError, match=r"short\.mp4 has 3 frames, at least 4 are needed"):
        probe(path, at_least=4)
    with pytest.raises(BadVideo, match="frame 3 was asked for, there are 3"):
        decode(path, [0, 3])
    with pytest.raises(BadVideo, match="frame 2 was asked for, there are 2"):
        decode(pictures(tmp_path / "clip", 2), [2])


@pytest.mark.parametrize("wanted", [[2, 1], [-1, 0]])
def test_numbers_must_ascend(tmp_path: Path, wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        decode(tmp_path / "any.mp4", wanted)


def test_damage_is_reported_not_guessed_around(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        for number, packet in enumerate(packets(24, "libx264", container)):
            if number != 12:
                container.mux(packet)
                continue
            copy = av.Packet(b"\xff" * packet.size)
            copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, packet.stream
            container.mux(copy)
    assert probe(path).frames == 24
    assert numbers_in(decode(path, [0, 3])) == [0, 3]  # before the damage
    with pytest.raises(BadVideo, match=r"a\.mp4"):
        decode(path, list(range(24)))


def test_pictures_of_different_sizes(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "clip", 2)
    Image.new("RGB", (31, 20)).save(paths[1])
    assert len(decode(paths, [0, 0])) == 2
    with pytest.raises(BadVideo, match="differ in size"):
        decode(paths, [0, 1])
    paths[1].write_bytes(b"not a picture")
    with pytest.raises(BadVideo, match=r"frame1\.png"):
        decode(paths, [0, 1])
