"""Proof, before anything runs, that a schedule is complete, comes to its end, and keeps within its memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule, name


def validate(
    schedule: Schedule,
    micro_batches: int,
    max_live: int | Sequence[int] | None = None,
    buffers: int | None = None,
    frozen: int = 0,
) -> None:
    """Raises UserError, naming stage, position (from 0) and action, unless

    - each chunk, from the first to the last without a gap, has one stage, which forwards every micro-batch once and
      takes its gradient once: in one backward, or in its two parts. The first `frozen` chunks have no backward;
    - every receive gets what it is for, though transfers carry no names: what one stage sends another in one
      direction arrives in the order in which it is wanted;
    - the stages come to the end. Receives wait. Sends are buffered, as in the executor, or limited: with `buffers`, a
      channel (one stage to another, in one direction) holds so many transfers whose receiver does not ask for them
      yet, and a sender waits while there are more. With 0, sends block: a stage posts what its last action sends
      together with what its next action receives, and goes on when both are through;
    - no stage holds more activations at once than max_live (one number, or one for each stage): micro-batches of a
      chunk that were forwarded and whose backward, both parts of it, is not done. A chunk without a backward holds
      none.
    """
    _check_complete(schedule, micro_batches, frozen)
    graph = Graph(schedule)
    _check_channels(schedule, graph)
    order_of_execution(schedule, graph, buffers)
    if max_live is not None:
        _check_live(schedule, [max_live] * len(schedule) if isinstance(max_live, int) else max_live)


def live_activations(actions: Sequence[Action]) -> list[int]:
    """How many micro-batches of its chunks a stage holds after each of its actions."""
    live, counts = 0, []
    trained = {action.chunk for action in actions if action.kind is not Kind.FORWARD}
    for action in actions:
        starts = action.kind is Kind.FORWARD and action.chunk in trained
        live += starts - (action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT))
        counts.append(live)
    return counts


def order_of_execution(schedule: Schedule, graph: Graph, buffers: int | None = None) -> list[Action]:
    """All actions in an order in which the stages can do them. Raises UserError when the stages wait for each other.

    buffers: as in `validate`.
    """
    gates = {} if buffers is None else _gates(schedule, graph, buffers)
    cursor = [0] * len(schedule)
    order: list[Action] = []
    done: set[Action] = set()

    def waits_for(stage: int) -> Action | None:
        """The action that has to be done, or for a send to be next on its stage, before this stage goes on."""
        at = cursor[stage]
        for need in graph.needs(schedule[stage][at]):
            if need not in done:
                return need
        gate = gates.get(schedule[stage][at - 1]) if at else None
        if gate is not None and cursor[graph.place[gate][0]] < graph.place[gate][1]:
            return gate
        return None

    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule):
            while cursor[stage] < len(actions) and waits_for(stage) is None:
                done.add(actions[cursor[stage]])
                order.append(actions[cursor[stage]])
                cursor[stage] += 1
                moved = True
    stuck = [stage for stage, actions in enumerate(schedule) if cursor[stage] < len(actions)]
    if stuck:
        waits = [(_where(schedule, s, cursor[s]), waits_for(s)) for s in stuck]
        places = [f"{here} waits for {_where(schedule, *graph.place[it])}" for here, it in waits if it is not None]
        raise UserError(f"schedule: deadlock; {'; '.join(places)}")
    return order


def _gates(schedule: Schedule, graph: Graph, buffers: int) -> dict[Action, Action]:
    """For each action that sends: the receiving action that must be next on its stage for the send to be through."""
    gates = {}
    for targets in _channels(schedule, graph)[0].values():
        for i in range(buffers, len(targets)):
            sender = next(n for n in graph.needs(targets[i]) if graph.feeds(n) == targets[i] and graph.travels(n))
            gates[sender] = targets[i - buffers]
    return gates


def _check_complete(schedule: Schedule, micro_batches: int, frozen: int) -> None:
    stage_of: dict[int, int] = {}
    for stage, actions in enumerate(schedule):
        seen: dict[Action, int] = {}
        for at, action in enumerate(actions):
            here = f"schedule: {_where(schedule, stage, at)}"
            if action.micro_batch >= micro_batches:
                raise UserError(f"{here}: there are {micro_batches} micro-batches, counted from 0")
            if stage_of.setdefault(action.chunk, stage) != stage:
                raise UserError(f"{here}: chunk {action.chunk} has its place on stage {stage_of[action.chunk]}")
            if action.chunk < frozen and action.kind is not Kind.FORWARD:
                raise UserError(f"{here}: nothing in chunk {action.chunk} or before it is trained; take the action out")
            for other in _excluded_by(action):
                if other in seen:
                    raise UserError(f"{here}: position {seen[other]} has {name(other, stage)} already")
            seen[action] = at
        if not actions:
            raise UserError(f"schedule: stage {stage} has no action; each needs a chunk of the model")
        for chunk in sorted({action.chunk for action in actions}):
            for m in range(micro_batches):
                if missing := _missing(seen, m, chunk, frozen):
                    raise UserError(
                        f"schedule: stage {stage} ends at position {len(actions)} without {name(missing, stage)}"
                    )
    for chunk in range(max(stage_of, default=-1)):
        if chunk not in stage_of:
            raise UserError(f"schedule: chunk {chunk} is on no stage, though there are later ones")


def _excluded_by(action: Action) -> list[Action]:
    """What may not come beside an action: itself again, and for a full backward a part of it."""
    parts = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    kinds = {Kind.BACKWARD: parts}.get(action.kind, (Kind.BACKWARD,) if action.kind in parts else ())
    return [Action(kind, action.micro_batch, action.chunk) for kind in (action.kind, *kinds)]


def _missing(seen: dict[Action, int], micro_batch: int, chunk: int, frozen: int) -> Action | None:
    split = any(Action(k, micro_batch, chunk) in seen for k in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT))
    backward = [Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT] if split else [Kind.BACKWARD]
    if chunk < frozen:
        backward = []
    wanted = (Action(kind, micro_batch, chunk) for kind in (Kind.FORWARD, *backward))
    return next((action for action in wanted if action not in seen), None)


_Channels = dict[tuple[bool, int, int], list[Action]]


def _channels(schedule: Schedule, graph: Graph) -> tuple[_Channels, _Channels]:
    """Receiving actions by channel, in the order in which they are sent for, and in that in which they come.

    A channel is what one stage sends another in one direction through the model: (forward?, from, to).
    """
    sent: _Channels = defaultdict(list)
    wanted: _Channels = defaultdict(list)
    for stage, actions in enumerate(schedule):
        for action in actions:
            forward = action.kind is Kind.FORWARD
            target = graph.feeds(action)
            if target is not None and graph.travels(action):
                sent[forward, stage, graph.place[target][0]].append(target)
            for need in graph.needs(action):
                if graph.travels(need) and graph.feeds(need) == action:
                    wanted[forward, graph.place[need][0], stage].append(action)
    return sent, wanted


def _check_channels(schedule: Schedule, graph: Graph) -> None:
    sent, wanted = _channels(schedule, graph)
    for channel, targets in sent.items():
        _, source, there = channel
        for first, asked in zip(targets, wanted[channel], strict=True):
            if first != asked:
                raise UserError(
                    f"schedule: {_where(schedule, *graph.place[asked])} would receive what stage {source} sends for "
                    f"{name(first, there)}; transfers carry no names, both stages must keep to one order"
                )


def _check_live(schedule: Schedule, max_live: Sequence[int]) -> None:
    for stage, (actions, most) in enumerate(zip(schedule, max_live, strict=True)):
        for at, live in enumerate(live_activations(actions)):
            if live > most:
                raise UserError(
                    f"schedule: {_where(schedule, stage, at)} makes {live} live activations; the stage may hold {most}"
                )


def _where(schedule: Schedule, stage: int, at: int) -> str:
    return f"stage {stage}, position {at}, {name(schedule[stage][at], stage)}"
