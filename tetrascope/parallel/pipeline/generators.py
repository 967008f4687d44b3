"""Schedule generators. A new one is a function from stages and micro-batches to a schedule, and an entry below."""

from __future__ import annotations

from collections.abc import Callable

from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965). Keeps every micro-batch's activations."""
    forwards = tuple(Action(Kind.FORWARD, m) for m in range(micro_batches))
    backwards = tuple(Action(Kind.BACKWARD, m) for m in range(micro_batches))
    return (forwards + backwards,) * stages


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """1F1B: stage s keeps at most stages − s micro-batches in flight (PipeDream-Flush, arXiv 2006.09503)."""
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, micro_batches)
        actions = [Action(Kind.FORWARD, m) for m in range(warm_up)]
        for m in range(warm_up, micro_batches):
            actions += [Action(Kind.FORWARD, m), Action(Kind.BACKWARD, m - warm_up)]
        actions += [Action(Kind.BACKWARD, m) for m in range(micro_batches - warm_up, micro_batches)]
        schedule.append(tuple(actions))
    return tuple(schedule)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
"""Generators by name."""
