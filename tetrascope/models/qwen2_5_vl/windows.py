"""Window attention of Qwen2.5-VL's vision encoder: which rows are a window, and the order that puts them together.

A frame's merged patches are divided into squares from the top left; at the right and bottom edge windows are what is
left. Rows are fed to the encoder window by window, so that windows as well as frames are contiguous runs of them and
the model permutes nothing (transformers permutes inside the model: `get_vision_window_index` in vision_utils.py).
"""

from __future__ import annotations

import numpy as np


def window_lengths(rows: int, columns: int, side: int, patches: int = 1) -> tuple[int, ...]:
    """Lengths of a frame's windows, row by row of windows. rows, columns: of merged patches, `patches` patches each."""
    heights, widths = ([min(side, n - first) for first in range(0, n, side)] for n in (rows, columns))
    return tuple(height * width * patches for height in heights for width in widths)


def window_order(rows: int, columns: int, side: int) -> np.ndarray:
    """The merged patches of a frame window by window, int64 `[rows · columns]`: numbers counted row by row.

    Inside a window they lie row by row.
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    return np.lexsort((column, row, column // side, row // side))


def video_order(frames: int, rows: int, columns: int, side: int) -> np.ndarray:
    """The same for all frames end to end, int64 `[frames · rows · columns]`; windows do not reach across frames."""
    frame = window_order(rows, columns, side)
    return (np.arange(frames)[:, None] * len(frame) + frame).reshape(-1)
