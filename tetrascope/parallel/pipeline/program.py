"""What a stage does, with every transfer written out: derived from a schedule, all that the executor needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule
from tetrascope.parallel.pipeline.validator import order_of_execution


@dataclass(frozen=True)
class Instruction:
    """An action, the stage that what it needs comes from, and the stage that its output goes to.

    Either may be the stage itself, where chunks that follow each other are on one stage; None: there is none. An action
    that needs what two stages do (a backward, its own forward and a gradient) has the one that it is sent something by.
    trained: whether the chunk has backwards; trained_before: whether the chunk before it has.

    What comes from another stage is sent without anything more of this one once `after` of its instructions are done,
    and by then the other has received (`taken`) so many gradients and so many activations of this stage.
    """

    action: Action
    source: int | None
    target: int | None
    trained: bool
    trained_before: bool
    after: int
    taken: tuple[int, int]

    @property
    def forward(self) -> bool:
        return self.action.kind is Kind.FORWARD


@lru_cache(maxsize=8)
def graph_of(schedule: Schedule) -> Graph:
    """`Graph`, made once for a schedule that serves many steps."""
    return Graph(schedule)


@lru_cache(maxsize=8)
def program(schedule: Schedule, stage: int) -> tuple[Instruction, ...]:
    """The instructions of a stage of a valid schedule."""
    return tuple(_instructions(schedule, graph_of(schedule), stage))


def _instructions(schedule: Schedule, graph: Graph, stage: int) -> Iterator[Instruction]:
    ahead = _waited_for(schedule, graph, stage)
    received = {other: _received(graph, schedule[other], stage) for other in range(len(schedule)) if other != stage}
    for action in schedule[stage]:
        giver, target = _giver(graph, action), graph.feeds(action)
        source, at = graph.place[giver] if giver else (None, 0)
        comes = giver is not None and source is not None and source != stage
        yield Instruction(
            action,
            source=source,
            target=graph.place[target][0] if target else None,
            trained=graph.has_backward(action.chunk),
            trained_before=action.chunk > 0 and graph.has_backward(action.chunk - 1),
            after=ahead[giver] if comes and giver else 0,
            taken=received[source][at] if comes and source is not None else (0, 0),
        )


def _giver(graph: Graph, action: Action) -> Action | None:
    """The action whose output this one takes."""
    return next((need for need in graph.needs(action) if graph.feeds(need) == action), None)


def _waited_for(schedule: Schedule, graph: Graph, stage: int) -> dict[Action, int]:
    """For every action, how many of a stage's it comes after in whatever order the stages run."""
    found: dict[Action, int] = {}
    so_far = [0] * len(schedule)
    for action in order_of_execution(schedule, graph):
        here, at = graph.place[action]
        waited = max((found[need] for need in graph.needs(action)), default=0)
        so_far[here] = at + 1 if here == stage else max(so_far[here], waited)
        found[action] = so_far[here]
    return found


def _received(graph: Graph, actions: tuple[Action, ...], stage: int) -> list[tuple[int, int]]:
    """Gradients and activations that have come from a stage when each of another's actions is done."""
    gradients, activations, found = 0, 0, []
    for action in actions:
        giver = _giver(graph, action)
        if giver is not None and graph.place[giver][0] == stage:
            activations += action.kind is Kind.FORWARD
            gradients += action.kind is not Kind.FORWARD
        found.append((gradients, activations))
    return found
