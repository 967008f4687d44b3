"""Schedules that depend on nothing but numbers. A new one is a function and an entry below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule
from tetrascope.parallel.pipeline.placement import Placement, fold, loop
from tetrascope.parallel.pipeline.transforms import without_later
from tetrascope.parallel.pipeline.zero_bubble import zb_h1, zb_v


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965). Keeps every micro-batch's activations.

    With p stages, m micro-batches and equal costs a share (p − 1) / (m + p − 1) of the time is bubble (§2.3 there).
    """
    return tuple(
        tuple(Action(kind, m, stage) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(micro_batches))
        for stage in range(stages)
    )


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """1F1B: stage s keeps at most stages − s micro-batches in flight (PipeDream-Flush, arXiv 2006.09503).

    Its bubble is GPipe's.
    """
    return tuple(
        _alternate(
            [Action(Kind.FORWARD, m, stage) for m in range(micro_batches)],
            [Action(Kind.BACKWARD, m, stage) for m in range(micro_batches)],
            warm_up=stages - 1 - stage,
        )
        for stage in range(stages)
    )


def interleaved(stages: int, micro_batches: int, virtual_stages: int = 2) -> Schedule:
    """Interleaved 1F1B (arXiv 2104.04473 §2.2): stage s of p holds chunks s, p + s, ..., (v − 1)·p + s.

    Micro-batches go in groups of p: a group's forwards through the stage's first chunk, then through its second, and
    so on; backwards from the last chunk to the first. With m a multiple of p, and costs that are equal in all chunks,
    a share (p − 1) / (v·m + p − 1) of the time is bubble, with v times as many transfers as in 1F1B. Any other m is
    the schedule for the next multiple without the micro-batches that there are not: leaving one out of a valid
    schedule leaves a valid one, since micro-batches do not wait for each other but on their own stage.
    """
    if virtual_stages == 1:
        return one_forward_one_backward(stages, micro_batches)
    groups = -(-micro_batches // stages)
    schedule = []
    for stage in range(stages):
        chunks = [stages * k + stage for k in range(virtual_stages)]

        def actions(kind: Kind, order: list[int]) -> list[Action]:
            return [Action(kind, g * stages + i, c) for g in range(groups) for c in order for i in range(stages)]

        # A stage waits a round trip to the last for the first gradient, two actions for each stage on the way, after
        # the first group has gone through all of its chunks but the last.
        warm_up = 2 * (stages - 1 - stage) + (virtual_stages - 1) * stages
        schedule.append(_alternate(actions(Kind.FORWARD, chunks), actions(Kind.BACKWARD, chunks[::-1]), warm_up))
    return without_later(tuple(schedule), micro_batches)


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> tuple[Action, ...]:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])


@dataclass(frozen=True)
class Generator:
    """make: stages, micro-batches and chunks a stage -> schedule; place: stages and chunks a stage -> where they are.

    virtual_stages: chunks of a stage where nothing else is asked for. fixed: whether there cannot be another number.
    """

    make: Callable[[int, int, int], Schedule]
    place: Callable[[int, int], Placement]
    virtual_stages: int = 1
    fixed: bool = True

    def __call__(self, stages: int, micro_batches: int, virtual_stages: int | None = None) -> Schedule:
        return self.make(stages, micro_batches, virtual_stages or self.virtual_stages)


def _vee(stages: int, virtual_stages: int) -> Placement:
    return fold(stages)


GENERATORS = {
    "gpipe": Generator(lambda p, m, v: gpipe(p, m), loop),
    "1f1b": Generator(lambda p, m, v: one_forward_one_backward(p, m), loop),
    "interleaved": Generator(interleaved, loop, virtual_stages=2, fixed=False),
    "zb-h1": Generator(lambda p, m, v: zb_h1(p, m), loop),
    "zb-v": Generator(lambda p, m, v: zb_v(p, m), _vee, virtual_stages=2),
}
"""Fixed schedules by name."""
