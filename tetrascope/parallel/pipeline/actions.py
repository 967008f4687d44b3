"""What a pipeline schedule is made of.

A schedule is a list of actions per stage, printable and comparable: `F0 F1 B0 F2 B1 B2`. Sends and receives are not
in it; they follow from the order.

The model is cut into chunks, numbered from input to output over all stages. Which stage holds a chunk is where its
actions stand (see placement.py). The first chunks may have no backward: nothing in them is trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest

from tetrascope.errors import UserError


class Kind(str, Enum):
    """What is done with a micro-batch.

    The gradient is computed either by one full backward, or in two parts (arXiv 2401.10241, figure 1): that of the
    chunk's input, for which the chunk before waits, and that of its weights, for which nothing waits before the
    optimizer.
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, order=True)
class Action:
    """One piece of work of a stage: a micro-batch through a chunk of the model. Numbers count from 0."""

    kind: Kind
    micro_batch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}c{self.chunk}"


Schedule = tuple[tuple[Action, ...], ...]
"""Actions in order, by stage."""

_IDLE = "-"
_WORD = re.compile(r"([FBIW])([0-9]+)(?:c([0-9]+))?")


def name(action: Action, stage: int) -> str:
    """An action as it is written in the line of a stage: `F3c5`, or `F3` where the chunk has the stage's number."""
    return f"{action.kind.value}{action.micro_batch}" if action.chunk == stage else str(action)


def to_text(schedule: Schedule) -> str:
    """One line a stage; a stage without actions is a dash."""
    return "\n".join(" ".join(name(a, s) for a in actions) or _IDLE for s, actions in enumerate(schedule))


def from_text(text: str) -> Schedule:
    """Reads what `to_text` writes; blank lines do not count. Raises UserError for a word that is no action."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return tuple(tuple(_action(word, stage) for word in words if words != [_IDLE]) for stage, words in enumerate(lines))


def _action(word: str, stage: int) -> Action:
    found = _WORD.fullmatch(word)
    if found is None:
        raise UserError(
            f"schedule: {word!r} is no action; expected F or B and a micro-batch number, as in F0, or I or W for the "
            "parts of a backward; a chunk other than the stage's own follows, as in F0c5"
        )
    kind, micro_batch, chunk = found.groups()
    return Action(Kind(kind), int(micro_batch), stage if chunk is None else int(chunk))


def placement_of(schedule: Schedule) -> tuple[int, ...]:
    """The stage of every chunk, of a complete schedule."""
    stage_of = {action.chunk: stage for stage, actions in enumerate(schedule) for action in actions}
    return tuple(stage_of[chunk] for chunk in sorted(stage_of))


def difference(left: Schedule, right: Schedule) -> str:
    """A line for each stage on which two schedules part, at the first action that is not the same; empty if none."""
    lines = []
    for stage, (ours, theirs) in enumerate(zip_longest(left, right)):
        if ours is None or theirs is None:
            lines.append(f"stage {stage}: only in the {'right' if ours is None else 'left'} schedule")
        elif ours != theirs:
            pairs = list(zip_longest(ours, theirs))
            at = next(i for i, (a, b) in enumerate(pairs) if a != b)
            a, b = ("nothing more" if action is None else name(action, stage) for action in pairs[at])
            lines.append(f"stage {stage}, position {at}: {a} on the left, {b} on the right")
    return "\n".join(lines)


class Graph:
    """What has to be done before what, apart from the order on each stage. For complete schedules (see `validate`)."""

    def __init__(self, schedule: Schedule) -> None:
        self.place: Mapping[Action, tuple[int, int]] = {
            action: (stage, at) for stage, actions in enumerate(schedule) for at, action in enumerate(actions)
        }
        self.chunks = 1 + max((action.chunk for action in self.place), default=-1)

    def needs(self, action: Action) -> tuple[Action, ...]:
        """A forward needs the chunk before; a backward its own forward and the gradient that the chunk after sends;
        the gradient of the weights that of the input."""
        m, chunk = action.micro_batch, action.chunk
        if action.kind is Kind.BACKWARD_WEIGHT:
            return (Action(Kind.BACKWARD_INPUT, m, chunk),)
        if action.kind is Kind.FORWARD:
            return (Action(Kind.FORWARD, m, chunk - 1),) if chunk else ()
        gradient = self._gradient_of(m, chunk + 1)
        return (Action(Kind.FORWARD, m, chunk), *((gradient,) if gradient else ()))

    def feeds(self, action: Action) -> Action | None:
        """The action of the neighbouring chunk that takes this one's output; None if there is none."""
        m, chunk = action.micro_batch, action.chunk
        if action.kind is Kind.BACKWARD_WEIGHT:
            return None
        if action.kind is Kind.FORWARD:
            return Action(Kind.FORWARD, m, chunk + 1) if chunk < self.chunks - 1 else None
        return self._gradient_of(m, chunk - 1)

    def has_backward(self, chunk: int) -> bool:
        """Whether gradients are computed in a chunk; not so where it and all before it are frozen."""
        return self._gradient_of(0, chunk) is not None

    def travels(self, action: Action) -> bool:
        """Whether this one's output goes to another stage."""
        target = self.feeds(action)
        return target is not None and self.place[target][0] != self.place[action][0]

    def _gradient_of(self, micro_batch: int, chunk: int) -> Action | None:
        """The action that gives the gradient of this chunk's input; None if none does."""
        for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            if (action := Action(kind, micro_batch, chunk)) in self.place:
                return action
        return None
