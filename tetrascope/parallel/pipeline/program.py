"""What a stage does, with every transfer written out: derived from a schedule, all that the executor needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule


@dataclass(frozen=True)
class Instruction:
    """An action, the stage that what it needs comes from, and the stage that its output goes to.

    Either may be the stage itself, where chunks that follow each other are on one stage; None: there is none. An action
    that needs what two stages do (a backward, its own forward and a gradient) has the one that it is sent something by.
    trained: whether the chunk has backwards; trained_before: whether the chunk before it has.
    """

    action: Action
    source: int | None
    target: int | None
    trained: bool
    trained_before: bool

    @property
    def forward(self) -> bool:
        return self.action.kind is Kind.FORWARD


@lru_cache(maxsize=8)
def graph_of(schedule: Schedule) -> Graph:
    """`Graph`, made once for a schedule that serves many steps."""
    return Graph(schedule)


@lru_cache(maxsize=64)
def program(schedule: Schedule, stage: int) -> tuple[Instruction, ...]:
    """The instructions of a stage of a valid schedule."""
    return tuple(_instructions(graph_of(schedule), schedule[stage]))


def _instructions(graph: Graph, actions: tuple[Action, ...]) -> Iterator[Instruction]:
    for action in actions:
        fed_by = [need for need in graph.needs(action) if graph.feeds(need) == action]
        target = graph.feeds(action)
        yield Instruction(
            action,
            source=graph.place[fed_by[0]][0] if fed_by else None,
            target=graph.place[target][0] if target else None,
            trained=graph.has_backward(action.chunk),
            trained_before=action.chunk > 0 and graph.has_backward(action.chunk - 1),
        )
