"""What each chunk of the model holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tetrascope.parallel.pipeline.placement import Placement, chunks_of, with_vision


@dataclass(frozen=True)
class Cut:
    """placement: the stage of every chunk. layers: the decoder layers of every chunk.

    The first chunk begins with vision encoder, adaptor and token embedding. With `vision_chunk`, encoder and adaptor
    are a chunk of their own, number 0, which has no layers, and the next one begins with the embedding. The last chunk
    ends with norm, output head and loss.
    """

    placement: Placement
    layers: tuple[range, ...]
    vision_chunk: bool = False

    @classmethod
    def of(cls, placement: Placement, counts: Sequence[int], vision_chunk: bool = False) -> Cut:
        """placement, counts: stage and number of decoder layers of every chunk, vision encoder not counted as one."""
        starts = [sum(counts[:chunk]) for chunk in range(len(counts))]
        layers = tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))
        if vision_chunk:
            return cls(with_vision(placement), (range(0), *layers), vision_chunk=True)
        return cls(placement, layers)

    @property
    def first(self) -> int:
        """The chunk with the token embedding."""
        return int(self.vision_chunk)

    @property
    def last(self) -> int:
        """The chunk with the output head."""
        return len(self.placement) - 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Decoder layers of every chunk but the vision encoder's."""
        return tuple(len(layers) for layers in self.layers[self.first :])

    def chunks(self, stage: int) -> tuple[int, ...]:
        """The chunks of a stage."""
        return chunks_of(self.placement, stage)

    def chunk_of(self, layer: int) -> int:
        """The chunk that holds a decoder layer."""
        return next(chunk for chunk, layers in enumerate(self.layers) if layer in layers)
