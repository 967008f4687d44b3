"""What the planner knows of a sample."""

from __future__ import annotations

from dataclasses import dataclass

from tetrascope.models.media import Media


@dataclass(frozen=True)
class SampleInfo:
    """Tokens after expansion, how many of them are targets of the loss, and the images and videos."""

    tokens: int
    supervised: int
    media: tuple[Media, ...]

    @property
    def patches(self) -> int:
        """Encoder rows."""
        return sum(one.patches for one in self.media)
