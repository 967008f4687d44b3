"""Which stage holds which chunk of the model. A placement is the stage of every chunk, chunks from input to output."""

from __future__ import annotations

Placement = tuple[int, ...]


def loop(stages: int, virtual_stages: int = 1) -> Placement:
    """Round after round over the stages: of p stages, stage s holds chunks s, p + s, ... (arXiv 2104.04473 §2.2)."""
    return tuple(range(stages)) * virtual_stages


def fold(stages: int) -> Placement:
    """Down and up again, a V: stage s of p holds chunks s and 2p − 1 − s (arXiv 2405.15362)."""
    return (*range(stages), *reversed(range(stages)))


def with_vision(placement: Placement) -> Placement:
    """The vision encoder as a chunk of its own, before the others, on the stage of the first of them."""
    return (placement[0], *placement)


def chunks_of(placement: Placement, stage: int) -> tuple[int, ...]:
    """The chunks that a stage holds."""
    return tuple(chunk for chunk, place in enumerate(placement) if place == stage)
