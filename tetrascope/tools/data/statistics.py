"""Statistics of indexed samples: arrays over an index, no file of a sample is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tetrascope.engine.data.index import Bad, Index
from tetrascope.engine.plan import CostFn, SampleInfo
from tetrascope.models.media import Media

FLOP_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


@dataclass(frozen=True)
class Measure:
    """Something that was measured of each sample, image or video (`of`, in the plural). values: float64 `[n]`."""

    title: str
    unit: str
    of: str
    values: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """What is known of one source, or of all together. measures: those that have a value, for display.

    tokens, supervised, visual (tokens), images and videos are totals.
    """

    name: str
    samples: int
    tokens: int
    supervised: int
    visual: int
    images: int
    videos: int
    bad: tuple[Bad, ...]
    measures: tuple[Measure, ...]

    @property
    def bad_kinds(self) -> dict[str, int]:
        """How many samples are left out, by kind, most frequent first."""
        return dict(Counter(bad.kind for bad in self.bad).most_common())


def statistics(name: str, indexes: Sequence[Index], cost: CostFn) -> Statistics:
    """Statistics over some indexes. `cost` must not be more than the sum of what its tokens and its media cost."""
    tokens = np.concatenate([index.columns["tokens"] for index in indexes])
    supervised = np.concatenate([index.columns["supervised"] for index in indexes])
    images = _of_samples(indexes, lambda media: sum(one.kind == "image" for one in media))
    videos = _of_samples(indexes, lambda media: sum(one.kind == "video" for one in media))
    visual = _of_samples(indexes, lambda media: sum(one.tokens for one in media))
    # Decoder work follows from the tokens alone and vision work from the media alone: few distinct ones of either.
    lengths, which = np.unique(tokens, return_inverse=True)
    decoder = np.array([cost(SampleInfo(int(n), 0, ())).decoder for n in lengths])[which]
    vision = _of_samples(indexes, lambda media: cost(SampleInfo(0, 0, media)).vision)
    measures = (
        Measure("Tokens per sample", "tokens", "samples", tokens),
        Measure("Supervised tokens per sample", "tokens", "samples", supervised),
        Measure("Images per sample", "images", "samples", images if images.any() else images[:0]),
        Measure("Share of visual tokens", "% of a sample's tokens", "samples", _percent(visual, tokens)),
        Measure("Image width", "pixels", "images", _of_media(indexes, "image", lambda one: one.size[0])),
        Measure("Image height", "pixels", "images", _of_media(indexes, "image", lambda one: one.size[1])),
        Measure("Frames taken per video", "frames", "videos", _of_media(indexes, "video", _frames)),
        _flops("Decoder work per sample", decoder),
        _flops("Vision work per sample", vision if vision.any() else vision[:0]),
    )
    return Statistics(
        name,
        len(tokens),
        int(tokens.sum()),
        int(supervised.sum()),
        int(visual.sum()),
        int(images.sum()),
        int(videos.sum()),
        tuple(bad for index in indexes for bad in index.bad),
        tuple(measure for measure in measures if len(measure.values)),
    )


def _of_samples(indexes: Sequence[Index], measure: Callable[[tuple[Media, ...]], float]) -> np.ndarray:
    """A number for the media of every sample, worked out once where samples have equal ones."""
    return np.concatenate(
        [np.array([measure(m) for m in index.media], dtype=np.float64)[index.shown] for index in indexes]
    )


def _of_media(indexes: Sequence[Index], kind: str, measure: Callable[[Media], float]) -> np.ndarray:
    """A number for every image or every video of the samples."""
    found = [np.zeros(0)]
    for index in indexes:
        times = np.bincount(index.shown, minlength=len(index.media))
        for media, count in zip(index.media, times.tolist(), strict=True):
            values = np.array([measure(one) for one in media if one.kind == kind], dtype=np.float64)
            found.append(np.tile(values, count))
    return np.concatenate(found)


def _frames(one: Media) -> int:
    return len(one.numbers) or len(one.frames)


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return 100 * part / whole if part.any() else part[:0]


def _flops(title: str, values: np.ndarray) -> Measure:
    """In the unit in which the largest value is below 1000."""
    largest = values.max(initial=0.0)
    scale, unit = next((pair for pair in FLOP_UNITS if largest >= pair[0]), (1.0, "FLOP"))
    return Measure(title, f"{unit}, forward and backward", "samples", values / scale)
