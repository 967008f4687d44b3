"""Reading videos: what the header says, and exactly the frames that were asked for, with PyAV (FFmpeg inside).

Frame k is the k-th frame in presentation order, the order in which a player shows them (B-frames are stored in
another). A video is a file, a folder of pictures, or a list of picture files. Rotation stored as metadata is ignored:
frames come as they were coded. Everything runs in the calling thread.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeGuard

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from tetrascope.errors import UserError

Source: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | BinaryIO"

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class BadVideo(Exception):
    """A video that could be opened when the data was indexed does not give a frame it should have."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding it; `seconds` = frames / fps; width and height in pixels as coded."""

    frames: int
    fps: float
    width: int
    height: int
    seconds: float


def probe(source: Source, *, fps: float = 1.0, at_least: int = 1) -> VideoInfo:
    """Frame count, rate and size of a video, from its header, or from its packets where the header has no count.

    Args:
        source: a video file (a path, or open and seekable), a folder of pictures (in natural order: 2.png before
            10.png) or a list of picture files.
        fps: frames per second of a folder or list of pictures; a video file has its own.
        at_least: the number of frames the caller needs.

    Raises:
        UserError: missing or unreadable, no video in it, or fewer than `at_least` frames.
    """
    pictures = _pictures(source)
    if pictures is None:
        info = _probe_file(source)
    elif not pictures:
        raise UserError(f"video {_name(source)} has no pictures; expected files ending in {', '.join(PICTURES)}")
    elif not fps > 0:
        raise UserError(f"video {_name(source)}: fps is {fps}, expected a positive number of frames per second")
    else:
        for picture in pictures:
            if not picture.is_file():
                raise UserError(f"video {_name(source)}: frame {picture} does not exist; correct the path")
        try:
            with Image.open(pictures[0]) as image:
                width, height = image.size
        except OSError as error:
            raise UserError(f"video {_name(source)}: cannot read frame {pictures[0]}: {error}") from error
        info = VideoInfo(len(pictures), fps, width, height, len(pictures) / fps)
    if info.frames < at_least:
        raise UserError(
            f"video {_name(source)} has {info.frames} frames, at least {at_least} are needed; "
            "leave it out of the data or ask for fewer frames"
        )
    return info


def decode(source: Source, numbers: Sequence[int]) -> list[Image.Image]:
    """The frames of these numbers as RGB pictures, all of one size.

    Args:
        source: as for `probe`.
        numbers: frame numbers from 0, ascending; a number may repeat (the same picture object is then returned again).

    Raises:
        ValueError: numbers that are negative or not ascending.
        BadVideo: a frame does not exist, cannot be decoded or is damaged, or the frames differ in size.
    """
    if list(numbers) != sorted(numbers) or (numbers and numbers[0] < 0):
        raise ValueError(f"frame numbers must be ascending and not negative, got {list(numbers)}")
    if not numbers:
        return []
    pictures = _pictures(source)
    found = _read_pictures(source, pictures, numbers) if pictures is not None else _decode_file(source, numbers)
    sizes = {image.size for image in found.values()}
    if len(sizes) > 1:
        raise BadVideo(f"video {_name(source)}: its frames differ in size: {sorted(sizes)}")
    return [found[number] for number in numbers]


# --- folders and lists of pictures


def _pictures(source: Source) -> list[Path] | None:
    """The picture files that make up the video; None if it is one video file."""
    if hasattr(source, "read"):
        return None
    if not isinstance(source, (str, os.PathLike)):
        return [Path(path) for path in source]
    folder = Path(source)
    if not folder.is_dir():
        return None
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in PICTURES), key=_natural)


def _natural(path: Path) -> tuple[tuple[int, str], ...]:
    """Sorting key by which frame2 comes before frame10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def _read_pictures(source: Source, pictures: list[Path], numbers: Sequence[int]) -> dict[int, Image.Image]:
    found: dict[int, Image.Image] = {}
    for number in set(numbers):
        if number >= len(pictures):
            raise BadVideo(f"video {_name(source)}: frame {number} was asked for, there are {len(pictures)}")
        try:
            with Image.open(pictures[number]) as image:
                found[number] = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadVideo(f"video {_name(source)}: cannot read frame {pictures[number]}: {error}") from error
    return found


def _is_open(source: Source) -> TypeGuard[BinaryIO]:
    return hasattr(source, "read")


def _name(source: Source) -> str:
    if hasattr(source, "read"):
        return "in memory"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return f"of {len(source)} pictures from {source[0]}" if len(source) else "of no pictures"


# --- video files


def _open(path: Source) -> tuple[InputContainer, VideoStream]:
    if _is_open(path):
        path.seek(0)
    container = av.open(path if _is_open(path) else _name(path), mode="r", metadata_errors="replace")
    if not container.streams.video:
        container.close()
        raise UserError(f"{_name(path)} has no video stream; give a video file, a folder of pictures or a list of them")
    stream = container.streams.video[0]
    # One thread: the ranks and loader processes of a host already fill its cores.
    stream.codec_context.thread_count = 1
    return container, stream


def _probe_file(path: Source) -> VideoInfo:
    try:
        container, stream = _open(path)
        with container:
            width, height = stream.codec_context.width, stream.codec_context.height
            # Frames that an edit list cuts off are in the header's count, but are never shown.
            frames = stream.frames - sum(entry.is_discard for entry in stream.index_entries) if stream.frames else 0
            rate = stream.average_rate or stream.guessed_rate
            if frames <= 0:
                frames = sum(1 for _ in _shown_packets(container, stream))
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot read video {_name(path)}: {error}; correct the path or leave it out") from error
    if not rate or not width or not height:
        raise UserError(f"video {_name(path)}: its header has no frame rate or no size; convert it to another format")
    return VideoInfo(frames, float(rate), width, height, float(frames / rate))


def _shown_packets(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int | None, bool]]:
    """(presentation time, is a key frame) of every coded frame that is shown, in stored order; nothing is decoded."""
    vp8 = stream.codec_context.name in ("vp8", "libvpx")
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        # VP8 stores alternate reference frames, which are never shown, as packets of their own (RFC 6386, 9.1).
        if vp8 and not bytes(packet)[0] & 0x10:
            continue
        yield packet.pts, packet.is_keyframe


def _decode_file(path: Source, numbers: Sequence[int]) -> dict[int, Image.Image]:
    wanted = sorted(set(numbers))
    try:
        container, stream = _open(path)
        with container:
            packets = list(_shown_packets(container, stream))
        if wanted[-1] >= len(packets):
            raise BadVideo(f"video {_name(path)}: frame {wanted[-1]} was asked for, there are {len(packets)}")
        times = sorted(time for time, _ in packets if time is not None)
        keys = sorted(time for time, key in packets if key and time is not None)
        found = None
        if len(set(times)) == len(packets):
            # Some containers seek by decoding time and land past the key frame; then read from the beginning.
            found = _by_time(path, wanted, times, keys) or _by_time(path, wanted, times, [])
        # Raw streams have no presentation times, and AVI has wrong ones.
        return found or _by_count(path, wanted, len(packets))
    except (FFmpegError, OSError, UserError) as error:
        raise BadVideo(f"cannot decode video {_name(path)}: {error}") from error


def _by_time(path: Source, wanted: list[int], times: list[int], keys: list[int]) -> dict[int, Image.Image] | None:
    """Decode from the nearest of `keys` before each frame; None if the frames are not those of `times`, one by one."""
    found: dict[int, Image.Image] = {}
    container, stream = _open(path)
    with container:
        decoder = container.decode(stream)
        position: int | None = 0  # number of the frame that the decoder gives next; None: not known after a seek
        for number in wanted:
            at = bisect_right(keys, times[number])
            if at and position is not None and keys[at - 1] > times[position]:
                container.seek(keys[at - 1], stream=stream, backward=True)
                decoder, position = container.decode(stream), None
            for frame in decoder:
                if frame.pts is None:
                    return None
                position = bisect_left(times, frame.pts) if position is None else position
                if position >= len(times) or frame.pts != times[position]:
                    return None
                position += 1
                if position > number:
                    break
            if position != number + 1:
                return None
            found[number] = _picture(path, number, frame)
    return found


def _by_count(path: Source, wanted: list[int], total: int) -> dict[int, Image.Image]:
    """Decode everything and count; only a count that agrees with the file's is known to be right."""
    found: dict[int, Image.Image] = {}
    decoded = 0
    container, stream = _open(path)
    with container:
        for frame in container.decode(stream):
            if decoded in wanted:
                found[decoded] = _picture(path, decoded, frame)
            decoded += 1
    if decoded != total:
        raise BadVideo(f"video {_name(path)} is damaged: only {decoded} of its {total} frames can be decoded")
    return found


def _picture(path: Source, number: int, frame: VideoFrame) -> Image.Image:
    if frame.is_corrupt:
        raise BadVideo(f"video {_name(path)}: frame {number} is damaged")
    image: Image.Image = frame.to_image(threads=1)
    return image
