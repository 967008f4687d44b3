"""What a pipeline schedule is made of.

A schedule is a list of actions per stage, printable and comparable: `F0 F1 B0 F2 B1 B2`. Sends and receives are not
in it; they follow from the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tetrascope.errors import UserError


class Kind(str, Enum):
    """Forward or backward of a micro-batch."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True)
class Action:
    """One piece of work of a stage."""

    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}"


Schedule = tuple[tuple[Action, ...], ...]
"""Actions in order, by stage."""


def to_text(schedule: Schedule) -> str:
    """One line a stage."""
    return "\n".join(" ".join(map(str, actions)) for actions in schedule)


def from_text(text: str) -> Schedule:
    """Reads what `to_text` writes. Raises UserError for a word that is no action."""
    return tuple(tuple(_action(word) for word in line.split()) for line in text.strip().splitlines())


def _action(word: str) -> Action:
    if word[:1] not in ("F", "B") or not (word.isascii() and word[1:].isdigit()):
        raise UserError(f"schedule: {word!r} is no action; expected F or B and a micro-batch number, as in F0")
    return Action(Kind(word[0]), int(word[1:]))


def validate(schedule: Schedule, micro_batches: int) -> None:
    """Raises UserError unless every stage does every action once, in an order that fits its neighbours', to the end.

    Runs the schedule with buffered sends and blocking receives, as the executor does: a forward waits for the stage
    before it, a backward for the stage after it and for its own forward.
    """
    expected = {Action(kind, m) for kind in Kind for m in range(micro_batches)}
    for stage, actions in enumerate(schedule):
        if len(actions) != len(expected) or set(actions) != expected:
            raise UserError(
                f"schedule: stage {stage} must forward and backward each of {micro_batches} micro-batches once"
            )
    for kind in Kind:
        # Transfers carry no names: the n-th send must be what the neighbour's n-th receive is for.
        orders = [[a.micro_batch for a in actions if a.kind is kind] for actions in schedule]
        for stage, order in enumerate(orders):
            if order != orders[0]:
                raise UserError(
                    f"schedule: stages 0 and {stage} do the {kind.name.lower()}s of the micro-batches in different "
                    f"orders, {orders[0]} and {order}; all stages must keep to one"
                )
    done: set[tuple[int, Action]] = set()
    cursor = [0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule):
            while cursor[stage] < len(actions) and _needs(stage, actions[cursor[stage]], len(schedule)) <= done:
                done.add((stage, actions[cursor[stage]]))
                cursor[stage] += 1
                moved = True
    stuck = [f"stage {s} at {actions[cursor[s]]}" for s, actions in enumerate(schedule) if cursor[s] < len(actions)]
    if stuck:
        raise UserError(f"schedule: deadlock, {', '.join(stuck)}")


def _needs(stage: int, action: Action, stages: int) -> set[tuple[int, Action]]:
    if action.kind is Kind.FORWARD:
        return {(stage - 1, action)} if stage else set()
    needs = {(stage, Action(Kind.FORWARD, action.micro_batch))}
    return needs | ({(stage + 1, action)} if stage < stages - 1 else set())
