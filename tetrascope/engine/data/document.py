"""A sample ready to be packed, and for whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Mesh


@dataclass(frozen=True)
class Document:
    """A sample ready to be packed. patches: rows float32 `[n, P]` of all its images, None where this rank encodes
    none of them."""

    ids_T: np.ndarray
    positions_AT: np.ndarray
    weights_T: np.ndarray
    """float32 `[T]`: loss weight of each token as a target (0 = not supervised)."""
    media: tuple[Media, ...]
    patches: np.ndarray | None


@dataclass(frozen=True)
class ContextPlace:
    """A rank's place in ring × Ulysses context parallelism."""

    ring: int
    ulysses: int
    ring_rank: int
    ulysses_rank: int

    @classmethod
    def of(cls, mesh: Mesh) -> ContextPlace:
        """This rank's."""
        return cls(mesh.size("ring"), mesh.size("ulysses"), mesh.index("ring"), mesh.index("ulysses"))

    @property
    def ranks(self) -> int:
        return self.ring * self.ulysses

    @property
    def rank(self) -> int:
        """Among all context-parallel ranks."""
        return self.ring_rank * self.ulysses + self.ulysses_rank


ALONE = ContextPlace(1, 1, 0, 0)
