"""Schedules with a backward in two parts, so that gradients of weights fill what would be bubble (arXiv 2401.10241).

F, I and W below are the times of a forward, of the gradient of the input and of that of the weights; the paper calls
them T_F, T_B and T_W.
"""

from __future__ import annotations

from tetrascope.parallel.pipeline.actions import Action, Kind, Schedule
from tetrascope.parallel.pipeline.transforms import without_later

F, I, W = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741 (the paper's letters)


def zb_h1(stages: int, micro_batches: int) -> Schedule:
    """ZB-H1 (arXiv 2401.10241 §2.1, figure 3): the order of 1F1B, the gradients of weights behind.

    Stage s of p begins with p − s forwards and puts off the gradients of weights by s micro-batches, so that every
    stage holds at most p micro-batches, as many as the first stage of 1F1B. With W ≤ F the bubble is
    (p − 1)·(F + I − W) (§2.3), against (p − 1)·(F + I + W) of 1F1B.
    """
    schedule = []
    for stage in range(stages):
        line = _Line()
        line.add(min(stages - stage, micro_batches), (F, stage))
        for m in range(micro_batches):
            line.add(1, (I, stage))
            if m >= stage:
                line.add(1, (W, stage))
            if line.count(F, stage) < micro_batches:
                line.add(1, (F, stage))
        line.add(min(stage, micro_batches), (W, stage))
        schedule.append(tuple(line.actions))
    return tuple(schedule)


def zb_v(stages: int, micro_batches: int) -> Schedule:
    """ZB-V (arXiv 2401.10241 §6; V-ZB in arXiv 2405.15362): the model folded into a V.

    Stage s of p holds chunks s, on the way down, and 2p − 1 − s, on the way up: the first stage has both ends. It
    holds at most 2p activations of a chunk, as much as 1F1B on its first stage. With F = I = W and at least 2p
    micro-batches no stage waits between its first action and its last. Fewer micro-batches: see `without_later`.
    """
    count = max(micro_batches, 2 * stages)
    schedule = []
    for stage in range(stages):
        down, up = stage, 2 * stages - 1 - stage
        line = _Line()
        # Warm-up: forwards on the way down till the first comes back up, then both in turn.
        line.add(2 * (stages - stage) - 1, (F, down))
        line.add(stage, (F, up), (F, down))
        line.add(stages - stage, (F, up), (I, up), (W, up))
        # Steady state; the forwards on the way down run out first.
        ahead = count - line.count(F, down)
        line.add(ahead, (F, down), (I, down), (W, down), (F, up), (I, up), (W, up))
        line.add(count - stages - ahead, (I, down), (W, down), (F, up), (I, up), (W, up))
        # Cool-down: first what other stages wait for.
        line.add(stage, (I, down), (I, up))
        line.add(stages - stage, (I, down), (W, down))
        line.add(stage, (W, up))
        line.add(stage, (W, down))
        schedule.append(tuple(line.actions))
    return without_later(tuple(schedule), micro_batches)


class _Line:
    """Actions of one stage; each kind takes the micro-batches of a chunk in their order."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: dict[tuple[Kind, int], int] = {}

    def count(self, kind: Kind, chunk: int) -> int:
        return self._next.get((kind, chunk), 0)

    def add(self, times: int, *steps: tuple[Kind, int]) -> None:
        """Repeats steps, each a kind and a chunk, with the micro-batches that come next for them."""
        for _ in range(times):
            for kind, chunk in steps:
                m = self.count(kind, chunk)
                self._next[kind, chunk] = m + 1
                self.actions.append(Action(kind, m, chunk))
