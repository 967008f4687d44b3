"""An image or a video as the engine sees it: sizes alone, known from the file's header."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Media:
    """Everything about an image or a video that does not need its pixels.

    grid: the family's own description of its shape (Qwen: frames, patch rows, patch columns; tiling families: columns
    and rows of tiles). frames: encoder rows of each attention sequence (a frame, a tile, a view). windows: encoder
    rows of each window, where some blocks attend inside windows. features: rows that the adaptor gives. tokens:
    decoder tokens that stand for it, where the numbers differ (a newline token, pooled rows).
    numbers: which frames of a video file it is made of. times: seconds of each temporal step of a video.
    size: width and height in pixels before preprocessing.
    """

    kind: Literal["image", "video"]
    grid: tuple[int, ...]
    frames: tuple[int, ...]
    features: int
    tokens: int
    windows: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    size: tuple[int, int] = (0, 0)

    @property
    def patches(self) -> int:
        """Encoder rows."""
        return sum(self.frames)


class MediaOptions(Protocol):
    """What a user may choose about images and videos; None leaves a choice to the family.

    min_pixels, max_pixels: area of an image after resizing (native-resolution families). max_tiles: tiles of an image
    (tiling families). fps, min_frames, max_frames: how a video is sampled. video_max_pixels: area of a frame.
    """

    @property
    def min_pixels(self) -> int | None: ...
    @property
    def max_pixels(self) -> int | None: ...
    @property
    def max_tiles(self) -> int | None: ...
    @property
    def fps(self) -> float | None: ...
    @property
    def min_frames(self) -> int | None: ...
    @property
    def max_frames(self) -> int | None: ...
    @property
    def video_max_pixels(self) -> int | None: ...


@dataclass(frozen=True)
class DefaultMediaOptions:
    """Every choice left to the family."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_max_pixels: int | None = None


MEDIA_OPTIONS = tuple(field.name for field in fields(DefaultMediaOptions))


@dataclass(frozen=True)
class VisionLayout:
    """How the rows of a micro-batch's images and videos lie, and which feature becomes which token.

    positions_KN: int64 `[K, N]`, what the encoder must know of every row (row and column; place in a position table).
    picks_CV: int64 `[C, V]`: visual token v, counted over the micro-batch, is the sum over c of feature picks[c, v]
    times weights[c, v]. An index equal to the number of features means the adaptor's newline vector.
    weights_CV: float32 `[C, V]`; None: C is 1 and the weight 1.
    """

    positions_KN: Tensor
    picks_CV: Tensor
    weights_CV: Tensor | None = None


@dataclass(frozen=True)
class VisionCost:
    """Multiply-adds of vision encoder and adaptor, from shapes.

    patch: of the patch embedding, a row. linears: of all blocks' linears, a row. attention: of scores and weighted
    sums of all blocks that attend over a whole frame, a pair of rows. window_attention: the same of the blocks that
    attend inside windows. adaptor: a feature that comes out of it.
    """

    patch: int
    linears: int
    attention: int
    adaptor: int
    window_attention: int = 0


def square_pairs(lengths: tuple[int, ...]) -> int:
    """Pairs of rows that attend to each other, without a causal mask."""
    return sum(n * n for n in lengths)
