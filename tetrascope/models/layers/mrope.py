"""M-RoPE position ids, as the Qwen families share them (arXiv 2409.12191 §2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tetrascope.errors import UserError

RULES = ("paper", "hf")
"""Where positions go on after an image or a video, see `mrope_ids`."""


@dataclass(frozen=True)
class VisualRun:
    """The tokens of an image or a video: `steps`, the temporal position of every frame counted from where the run
    starts, ascending from 0; `rows` and `columns` of tokens in a frame."""

    steps: Sequence[int]
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return len(self.steps) * self.rows * self.columns


def mrope_ids(visual_T: np.ndarray, runs: Sequence[VisualRun], rule: str) -> np.ndarray:
    """Position ids int64 `[3, T]` (temporal, height, width) of one sample.

    visual: bool `[T]`, which tokens are visual. A text token has one position on all axes. A visual token of frame i
    has the position of the run's start plus (steps[i], row, column). What follows a visual run starts after the run's
    largest position (rule `paper`, also the original implementations), or max(rows, columns) after the run's start
    whatever its frames (`hf`: transformers 5). The two differ for videos whose temporal positions outgrow their sides.

    Raises UserError when the visual tokens do not match the runs.
    """
    positions = np.empty((3, len(visual_T)), dtype=np.int64)
    row, position = 0, 0
    for run in runs:
        text = int(visual_T[row:].argmax()) if visual_T[row:].any() else len(visual_T) - row
        positions[:, row : row + text] = position + np.arange(text)
        row, position = row + text, position + text
        grid = (len(run.steps), run.rows, run.columns)
        if row + run.tokens > len(visual_T) or not visual_T[row : row + run.tokens].all():
            shape = "x".join(map(str, grid))
            raise UserError(f"sample: expected {run.tokens} visual tokens at token {row} for a {shape} grid")
        here = np.indices(grid).reshape(3, run.tokens)
        here[0] = np.asarray(run.steps)[here[0]]
        positions[:, row : row + run.tokens] = position + here
        row += run.tokens
        side = max(run.rows, run.columns)
        position += max(run.steps[-1] + 1, side) if rule == "paper" else side
    if visual_T[row:].any():
        raise UserError(f"sample: {int(visual_T[row:].sum())} visual tokens belong to none of its {len(runs)} images")
    positions[:, row:] = position + np.arange(len(visual_T) - row)
    return positions
