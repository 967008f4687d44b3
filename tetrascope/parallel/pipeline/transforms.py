"""Valid schedules made from valid schedules."""

from __future__ import annotations

from collections.abc import Iterator

from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule


def without_later(schedule: Schedule, micro_batches: int) -> Schedule:
    """The schedule of the first so many micro-batches."""
    return tuple(tuple(a for a in actions if a.micro_batch < micro_batches) for actions in schedule)


def without_backward(schedule: Schedule, chunks: int) -> Schedule:
    """The schedule in which the first so many chunks compute no gradients: nothing in them is trained."""
    return tuple(tuple(a for a in actions if a.kind is Kind.FORWARD or a.chunk >= chunks) for actions in schedule)


def with_vision_chunk(schedule: Schedule) -> Schedule:
    """The schedule in which what the first chunk began with is a chunk of its own: every other chunk's number grows by
    one, and each action of the first is preceded (forward) or followed (backward) by the same of the new chunk."""
    return tuple(tuple(made for action in actions for made in _divided(action)) for actions in schedule)


def _divided(action: Action) -> Iterator[Action]:
    later = Action(action.kind, action.micro_batch, action.chunk + 1)
    if action.chunk:
        yield later
        return
    vision = Action(action.kind, action.micro_batch, 0)
    yield from (vision, later) if action.kind is Kind.FORWARD else (later, vision)
