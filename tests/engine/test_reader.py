"""Images and videos of a sample: sized from headers, decoded as planned, refused with the right word.

Runs count skipped samples by kind, so each kind is tested with a file as it is found in the wild. Videos carry their
frame's number as brightness, so that a wrong frame shows.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from tetrascope.engine.data import reader as module
from tetrascope.engine.data.decode.cache import DecodeCache
from tetrascope.engine.data.decode.images import Decoder
from tetrascope.engine.data.reader import MediaReader
from tetrascope.engine.data.sources.base import BadSample, Blob, MediaFile
from tetrascope.engine.data.store import Store
from tetrascope.models.layers.video_patches import VideoPatches
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.models.qwen2_vl import FAMILY
from tetrascope.tools.verify.families.qwen2_vl import tiny_config

OPTIONS = DefaultMediaOptions(min_pixels=784, fps=1.0, min_frames=2, max_frames=6, video_max_pixels=56 * 56)
LIMIT = 100_000
STEP = 20


def reader(options: DefaultMediaOptions = OPTIONS, **more: Any) -> MediaReader:
    config = tiny_config()
    media = FAMILY.media(config, options)
    return MediaReader(media, Store(), config.vision.patch, options.min_frames, LIMIT, **more)


def picture(seed: int = 0, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not have."""
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return png(picture())[:8] + b"\x00\x00\x00\x0d" + body + zlib.crc32(body).to_bytes(4, "big") + png(picture())[33:]


def mp4(frames: int = 10, rate: int = 2, kind: str = "mp4", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), 20 + STEP * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def numbers_in(pictures: list[Image.Image]) -> list[int]:
    return [round((float(np.asarray(one).mean()) - 20) / STEP) for one in pictures]


def write(path: Path, content: bytes) -> MediaFile:
    path.write_bytes(content)
    kind = "video" if path.suffix == ".mp4" else "image"
    return MediaFile(kind, (Blob(str(path)),))  # type: ignore[arg-type]


# --- what can be read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(9):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def shown(folder: Path, count: int = 9, fps: float = 1.0) -> MediaFile:
    """A video that is a list of pictures."""
    return MediaFile("video", tuple(Blob(str(folder / f"{i}.png")) for i in range(count)), fps)


def test_pictures_of_a_video_are_planned_from_the_header_and_read_as_planned(folder: Path) -> None:
    (media,) = reader().describe([shown(folder)])
    # Nine seconds at one frame a second, at most six, evenly from the first to the last; 90x60 pixels fit 3,136 as
    # 56x28: three pairs of frames of 2x4 patches.
    assert media.kind == "video" and media.numbers == (0, 2, 3, 5, 6, 8)
    assert media.times == (0.0, 3.0, 6.0)
    assert media.grid == (3, 2, 4) and media.frames == (8, 8, 8) and media.tokens == 6
    pictures = [picture(number) for number in media.numbers]
    patches = VideoPatches(max_pixels=56 * 56, min_pixels=56 * 56, total_pixels=24576 * 784).patches(pictures)
    rows = reader().rows(shown(folder), media)
    assert rows.shape == (media.patches, 1176) and np.array_equal(rows, patches)


def ways(content: bytes, name: str, folder: Path) -> dict[str, Blob]:
    """The same bytes as a file, inside a larger file, at its end, in memory, and as a range of a remote file."""
    folder = folder / f"ways-{name}"
    folder.mkdir()
    around = b"\x00junk" * 100 + content + b"more junk" * 100
    (folder / name).write_bytes(content)
    (folder / "all.tar").write_bytes(around)
    (folder / "end.tar").write_bytes(around[:500] + content)
    remote = f"memory://{folder}/all.tar"
    fsspec.filesystem("memory").pipe(remote, around)
    return {
        "file": Blob(str(folder / name)),
        "range": Blob(str(folder / "all.tar"), 500, len(content)),
        "end": Blob(str(folder / "end.tar"), 500),
        "memory": Blob("row 3", data=content),
        "remote": Blob(remote, 500, len(content)),
    }


def test_an_image_is_the_same_wherever_its_bytes_lie(tmp_path: Path) -> None:
    rows = []
    for blob in ways(png(picture()), "a.png", tmp_path).values():
        file = MediaFile("image", (blob,))
        (media,) = reader().describe([file])
        assert media.size == (90, 60)
        assert np.array_equal(np.asarray(reader().pictures(file, media)[0]), np.asarray(picture()))
        rows.append(reader().rows(file, media))
    assert all(np.array_equal(one, rows[0]) for one in rows) and len(rows) == 5


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_a_video_is_the_same_wherever_its_bytes_lie(tmp_path: Path, kind: str) -> None:
    for blob in ways(mp4(kind=kind), "a.video", tmp_path).values():
        file = MediaFile("video", (blob,))
        (media,) = reader().describe([file])
        # Ten frames at two a second: five seconds, so four frames (an even number of one a second).
        assert media.size == (64, 48) and media.numbers == (0, 3, 6, 9)
        assert numbers_in(reader().pictures(file, media)) == [0, 3, 6, 9]
        assert reader().rows(file, media).shape == (media.patches, 1176)


def test_a_reader_can_be_sent_to_another_process(folder: Path, tmp_path: Path) -> None:
    one = reader(cache=DecodeCache(tmp_path / "cache", 10**7))
    (media,) = one.describe([shown(folder)])
    again = pickle.loads(pickle.dumps(one))
    assert np.array_equal(one.rows(shown(folder), media), again.rows(shown(folder), media))


# --- what cannot


HTML = b"\n<!doctype HTML>\n<html><body>404 Not Found</body></html>"
BAD: dict[str, tuple[str, Callable[[], bytes | None], str, str]] = {
    "no such image": ("a.png", lambda: None, "missing file", "a.png does not exist"),
    "no such video": ("a.mp4", lambda: None, "missing file", "a.mp4 does not exist"),
    "zero bytes": ("a.png", lambda: b"", "empty file", "a.png is empty"),
    "zero bytes of video": ("a.mp4", lambda: b"", "empty file", "a.mp4 is empty"),
    "text": ("a.png", lambda: b"just words", "not an image", "cannot identify"),
    "half a header": ("a.png", lambda: png(picture())[:20], "not an image", "a.png is not readable"),
    "an error page": ("a.jpg", lambda: HTML, "wrong type", "a.jpg is an HTML page"),
    "an error in XML": ("a.jpg", lambda: b'<?xml version="1.0"?><Error/>', "wrong type", "is an XML file"),
    "an error in JSON": ("a.jpg", lambda: b'{"error": 404}', "wrong type", "is JSON"),
    "a PDF": ("a.jpg", lambda: b"%PDF-1.7 ...", "wrong type", "is a PDF"),
    "a ZIP": ("a.jpg", lambda: b"PK\x03\x04.....", "wrong type", "is a ZIP archive"),
    "a video as image": ("a.png", mp4, "wrong type", "a.png is an MP4 video"),
    "another video as image": ("a.png", lambda: mp4(kind="matroska"), "wrong type", "is a Matroska video"),
    "over the limit": ("a.png", lambda: bomb(400, 251), "image bomb", "400x251 pixels, more than .*=100000; shrink"),
    "a bomb": ("a.png", lambda: bomb(60000, 60000), "image bomb", "3600000000 pixels"),
    "large frames": ("a.mp4", lambda: mp4(2, size=(400, 252)), "image bomb", "400x252 pixels, more than"),
    "an error page as video": ("a.mp4", lambda: HTML, "wrong type", "a.mp4 is an HTML page"),
    "text as video": ("a.mp4", lambda: b"just words", "broken video", "a.mp4 is not readable"),
    "a truncated video": ("a.mp4", lambda: mp4()[:1500], "broken video", "a.mp4"),
    "a video of an unknown codec": ("a.mp4", lambda: mp4().replace(b"avc1", b"none"), "broken video", "a.mp4"),
    "too few frames": ("a.mp4", lambda: mp4(1), "other", "has 1 frames, at least 2 are needed"),
    "too small": ("a.png", lambda: png(picture(width=200, height=13)), "other", "200x13 pixels, less than .* 14x14"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_header_shows_to_be_bad(tmp_path: Path, case: str) -> None:
    name, content, kind, message = BAD[case]
    made = content()
    file = MediaFile("video" if name.endswith("mp4") else "image", (Blob(str(tmp_path / name)),))
    if made is not None:
        write(tmp_path / name, made)
    with pytest.raises(BadSample, match=message) as caught:
        reader().describe([file])
    assert caught.value.kind == kind
    if made is not None:
        in_memory = MediaFile(file.kind, (Blob(name, data=made),))
        with pytest.raises(BadSample) as caught:
            reader().describe([in_memory])
        assert caught.value.kind == kind


def test_what_only_decoding_shows_to_be_bad(tmp_path: Path) -> None:
    whole = png(picture())
    file = write(tmp_path / "a.png", whole)
    (media,) = reader().describe([file])
    cases = [(whole[: len(whole) // 2], "not an image"), (b"", "empty file"), (bomb(400, 251), "image bomb")]
    cases += [(HTML, "wrong type"), (png(picture(width=91)), "changed")]
    for content, kind in cases:
        write(tmp_path / "a.png", content)
        with pytest.raises(BadSample, match=r"a\.png") as caught:
            reader().rows(file, media)
        assert caught.value.kind == kind
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadSample, match="does not exist") as caught:
        reader().rows(file, media)
    assert caught.value.kind == "missing file"


def test_a_video_that_changes_or_breaks_after_it_was_indexed(tmp_path: Path) -> None:
    whole = mp4(kind="matroska")
    file = write(tmp_path / "a.mp4", whole)
    (media,) = reader().describe([file])
    for content, kind in [
        (whole[: len(whole) - 200], "broken video"),
        (mp4(5), "broken video"),  # has no frame 9
        (b"", "empty file"),
        (HTML, "wrong type"),
        (mp4(size=(64, 64)), "changed"),
    ]:
        write(tmp_path / "a.mp4", content)
        with pytest.raises(BadSample, match=r"a\.mp4") as caught:
            reader().rows(file, media)
        assert caught.value.kind == kind


def test_pictures_of_a_video_that_change_after_they_were_indexed(folder: Path) -> None:
    (media,) = reader().describe([shown(folder)])

    def kind() -> str:
        with pytest.raises(BadSample) as caught:
            reader().rows(shown(folder), media)
        return caught.value.kind

    with pytest.raises(BadSample, match="fewer pictures") as caught:
        reader().rows(shown(folder, 8), media)
    assert caught.value.kind == "changed"
    Image.new("RGB", (30, 30)).save(folder / "3.png")
    assert kind() == "changed"
    (folder / "3.png").write_bytes(bomb(1000, 1000))  # only the first picture's size is known before
    assert kind() == "image bomb"
    (folder / "3.png").unlink()
    assert kind() == "missing file"


def test_paths_that_lead_out_of_the_root_never_reach_the_reader(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "secret.png", png(picture()))
    write(tmp_path / "data" / "a.png", png(picture()))
    os.symlink(tmp_path / "secret.png", tmp_path / "data" / "link.png")
    store = Store(str(tmp_path / "data"))
    reader().describe([MediaFile("image", (Blob(store.resolve("a.png")),))])
    for path in ("../secret.png", "link.png", str(tmp_path / "secret.png")):
        with pytest.raises(BadSample, match=r"leads out of .*data") as caught:
            store.resolve(path)
        assert caught.value.kind == "outside root"


RAISED = (struct.error, zlib.error, OverflowError, ZeroDivisionError, EOFError, IndexError, KeyError)
RAISED += (NotImplementedError, OSError, SyntaxError, TypeError, ValueError)


@pytest.mark.parametrize("error", RAISED)
def test_whatever_a_decoder_raises_is_one_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    file = write(tmp_path / "a.png", png(picture()))
    (media,) = reader().describe([file])

    def fail(*args: Any) -> None:
        raise error("damaged inside")

    monkeypatch.setattr(Decoder, "decode", fail)
    with pytest.raises(BadSample, match="damaged inside") as caught:
        reader().rows(file, media)
    assert caught.value.kind == "not an image"


# --- the cache


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was decoded, in order."""
    calls: list[str] = []
    of_image, of_video = Decoder.decode, module.decode

    def image(self: Decoder, stream: Any) -> Image.Image:
        calls.append("image")
        return of_image(self, stream)

    def video(source: Any, numbers: Any) -> list[Image.Image]:
        calls.append("video")
        return of_video(source, numbers)

    monkeypatch.setattr(Decoder, "decode", image)
    monkeypatch.setattr(module, "decode", video)
    return calls


def test_the_cache_gives_the_same_rows_without_decoding(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    cache = DecodeCache(tmp_path / "cache", 10**7)
    files = [MediaFile("image", (blob,)) for blob in ways(png(picture()), "a.png", tmp_path).values()]
    files += [MediaFile("video", (blob,)) for blob in ways(mp4(), "a.mp4", tmp_path).values()]
    files.append(shown(folder))
    for file in files:
        (media,) = reader().describe([file])
        plain = reader().rows(file, media)
        decoded.clear()
        first = reader(cache=cache).rows(file, media)
        assert decoded
        decoded.clear()
        second = reader(cache=cache).rows(file, media)
        assert not decoded
        assert np.array_equal(plain, first) and np.array_equal(plain, second)


def test_another_file_range_frame_or_decoder_is_decoded(tmp_path: Path, decoded: list[str]) -> None:
    cache = DecodeCache(tmp_path / "cache", 10**7)
    one, other = png(picture(0)), png(picture(1))
    (tmp_path / "all.tar").write_bytes(one + other)
    first = MediaFile("image", (Blob(str(tmp_path / "all.tar"), 0, len(one)),))
    second = MediaFile("image", (Blob(str(tmp_path / "all.tar"), len(one), len(other)),))
    (media,) = reader().describe([first])
    a, b = (reader(cache=cache).pictures(file, media)[0] for file in (first, second))
    assert np.array_equal(a, picture(0)) and np.array_equal(b, picture(1)) and len(decoded) == 2
    # The same bytes in the same place, but written later: it may be another picture.
    os.utime(tmp_path / "all.tar", (1, 1))
    reader(cache=cache).pictures(first, media)
    assert len(decoded) == 3
    reader(cache=cache, decoder=Decoder("pillow", "of another version")).pictures(first, media)
    assert len(decoded) == 4
    video = write(tmp_path / "a.mp4", mp4())
    (media,) = reader().describe([video])
    (fewer,) = reader(DefaultMediaOptions(min_frames=2, max_frames=2)).describe([video])
    assert numbers_in(reader(cache=cache).pictures(video, media)) == list(media.numbers)
    assert numbers_in(reader(cache=cache).pictures(video, fewer)) == list(fewer.numbers)
    assert media.numbers != fewer.numbers and decoded[4:] == ["video", "video"]


def test_bytes_in_hand_are_known_by_their_content(tmp_path: Path, decoded: list[str]) -> None:
    cached = reader(cache=DecodeCache(tmp_path / "cache", 10**7))
    for seed in (0, 1, 0, 1):  # as a source may call all of its rows the same
        file = MediaFile("image", (Blob("row", data=png(picture(seed))),))
        (media,) = cached.describe([file])
        assert np.array_equal(np.asarray(cached.pictures(file, media)[0]), np.asarray(picture(seed)))
    assert len(decoded) == 2


def test_a_frame_may_be_shown_more_than_once(tmp_path: Path, decoded: list[str]) -> None:
    file = write(tmp_path / "a.mp4", mp4())
    (media,) = reader().describe([file])
    media = replace(media, numbers=(0, 3, 3, 3, 9))
    for cache in (None, DecodeCache(tmp_path / "cache", 10**7), DecodeCache(tmp_path / "cache", 10**7)):
        assert numbers_in(reader(cache=cache).pictures(file, media)) == [0, 3, 3, 3, 9]
    assert decoded == ["video", "video"]


def test_a_file_that_went_away_is_missing_with_a_cache_too(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", png(picture()))
    cached = reader(cache=DecodeCache(tmp_path / "cache", 10**7))
    (media,) = cached.describe([file])
    cached.rows(file, media)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadSample) as caught:
        cached.rows(file, media)
    assert caught.value.kind == "missing file"


def test_a_remote_file_is_asked_for_its_stamp_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = reader(cache=DecodeCache(tmp_path / "cache", 10**7))
    blob = ways(png(picture()), "a.png", tmp_path)["remote"]
    (media,) = cached.describe([MediaFile("image", (blob,))])
    asked: list[str] = []
    stamp = Store.stamp
    monkeypatch.setattr(Store, "stamp", lambda self, url: (asked.append(url), stamp(self, url))[1])
    for _ in range(3):
        cached.rows(MediaFile("image", (blob,)), media)
    assert asked == [blob.url]
