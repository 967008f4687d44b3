"""The vocabulary of weight mappings: which Hugging Face tensors a parameter is made of.

Every parameter of ours is a stack, along dimension 0, of one or more Hugging Face tensors, each viewed as a matrix
(a convolution kernel `[E, 3, 2, 14, 14]` as `[E, 1176]`) or, when it has one dimension, as a vector. The Hugging
Face names and shapes are also the *logical tensors* that checkpoints hold: they do not depend on any layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint: name and shape as on disk (hub layout)."""

    name: str
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape it is handled in: (rows, columns), or (rows,) for a vector."""
        return self.shape if len(self.shape) == 1 else (self.shape[0], math.prod(self.shape[1:]))


WeightMap = Mapping[str, tuple[HFTensor, ...]]
"""Parameter name of the whole, unsharded model -> the Hugging Face tensors stacked in it."""
