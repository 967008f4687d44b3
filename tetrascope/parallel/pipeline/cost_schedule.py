"""The schedule for costs that are known and unequal: the best of the fixed ones and of many grown for these costs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Graph, Schedule, name
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.list_scheduler import SLACK, ListScheduler, Policy, Problem, one_by_one
from tetrascope.parallel.pipeline.placement import Placement
from tetrascope.parallel.pipeline.simulator import Costs, Timeline, simulate
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward
from tetrascope.parallel.pipeline.validator import order_of_execution

_RULES: dict[str, tuple[Any, ...]] = {
    "split": (True, False),
    "priority": ("bftvw", "bfvtw", "bfvwt", "btfvw", "fbtvw"),
    "ahead": (1, 2, 4, 16),
    "queue": (0, 1, None),
    "patience": (0.0, 0.1, 0.3),
    "deep": (True, False),
    "reserve": (True, False),
}
"""What is tried for each rule of a policy."""

_ACTIONS = 40_000
_LEAST_RUNS = 24


def cost_schedule(
    placement: Placement,
    micro_batches: int,
    costs: Costs,
    caps: Sequence[float] | None = None,
    frozen: int = 0,
    vision_chunk: bool = False,
    effort: float = 1.0,
) -> Schedule:
    """The schedule with the smallest simulated makespan that is found: a pure function of its arguments.

    caps: bytes that each stage may hold, as the simulator counts them; None: any number. frozen: chunks, from the
    first, without a backward. vision_chunk: whether chunk 0 is the vision encoder alone, on the stage of chunk 1.
    effort: 1 places about 40,000 actions, but grows 24 schedules at least; 0 grows none.

    Candidates are the fixed generators that fit the placement (`fixed_schedules`) and schedules grown by
    `list_scheduler`, for some orders of the micro-batches to begin with, then by changing one rule or the place of one
    micro-batch at a time and keeping what does not make it slower. Hence none of the fixed ones that are within the
    caps is faster. All grown ones get by with one buffer (see `validate`).

    Raises UserError, naming stage, micro-batch and action, when not even one micro-batch at a time keeps to the caps.
    """
    problem = Problem(placement, micro_batches, costs, None if caps is None else tuple(caps), frozen, vision_chunk)
    search = _Search(problem)
    if effort:
        actions = micro_batches * (3 * problem.chunks - 2 * frozen)
        search.grow(max(_LEAST_RUNS, int(effort * _ACTIONS / actions)))
    return search.best


def fixed_schedules(
    placement: Placement, micro_batches: int, frozen: int = 0, vision_chunk: bool = False
) -> dict[str, Schedule]:
    """The schedules of the fixed generators whose chunks lie as in `placement`, by name. Arguments as in
    `cost_schedule`."""
    base = tuple(placement[vision_chunk:])
    stages = max(base) + 1
    virtual = len(base) // stages
    found = {}
    for label, generator in GENERATORS.items():
        if (generator.fixed and virtual != generator.virtual_stages) or generator.place(stages, virtual) != base:
            continue
        if virtual == 1 and not generator.fixed:
            continue  # 1F1B by another name
        schedule = generator(stages, micro_batches, virtual)
        found[label] = without_backward(with_vision_chunk(schedule) if vision_chunk else schedule, frozen)
    return found


def within(timeline: Timeline, caps: Sequence[float] | None) -> bool:
    """Whether no stage holds more bytes than its cap, but for rounding."""
    return caps is None or all(peak <= cap * (1 + SLACK) for peak, cap in zip(timeline.peak_bytes, caps, strict=True))


class _Search:
    """The best schedule so far; to begin with, the best of the fixed ones."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best = one_by_one(problem)
        thinnest = simulate(self.best, problem.costs)
        _check_caps(problem, self.best)
        self.makespan = thinnest.makespan
        shape = problem.placement, problem.micro_batches, problem.frozen, problem.vision_chunk
        for schedule in fixed_schedules(*shape).values():
            timeline = simulate(schedule, problem.costs)
            if timeline.makespan < self.makespan and within(timeline, problem.caps):
                self.best, self.makespan = schedule, timeline.makespan
        self.policy: Policy | None = None  # the best one
        self.random = random.Random(0)

    def grow(self, runs: int) -> None:
        """Grows so many schedules, fewer where nothing can be better or nothing new is tried any more."""
        scheduler = ListScheduler(self.problem)
        shortest = float("inf")
        tried: set[Policy] = set()
        for candidate in islice(self._candidates(), runs):
            if candidate in tried:
                continue
            tried.add(candidate)
            found = scheduler.run(candidate, limit=shortest * (1 + SLACK))
            if found is None or found.makespan > shortest:
                continue
            if candidate.queue is None and not _one_buffer_is_enough(found.schedule):
                continue
            self.policy, shortest = candidate, found.makespan
            if shortest < self.makespan:
                self.best, self.makespan = found.schedule, shortest
            if shortest <= scheduler.least * (1 + SLACK):
                return

    def _candidates(self) -> Iterator[Policy]:
        """Policies to try, without end; after the first ones, changes of the best so far."""
        capped = self.problem.caps is not None
        for order in _orders(self.problem):
            yield Policy(order, split=True)
            if capped:
                yield Policy(order, split=True, reserve=True)
        changes = [(rule, value) for rule, values in _RULES.items() for value in values if capped or rule != "reserve"]
        start = Policy(tuple(range(self.problem.micro_batches)), reserve=capped)
        while True:
            policy = self.policy or start
            if self.random.random() < 0.5:
                yield replace(policy, order=self._moved(policy.order))
            else:
                rule, value = self.random.choice(changes)
                yield replace(policy, **{rule: value})

    def _moved(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """The order with one micro-batch elsewhere."""
        changed = list(order)
        micro_batch = changed.pop(self.random.randrange(len(order)))
        changed.insert(self.random.randrange(len(order)), micro_batch)
        return tuple(changed)


def _one_buffer_is_enough(schedule: Schedule) -> bool:
    try:
        order_of_execution(schedule, Graph(schedule), buffers=1)
    except UserError:
        return False
    return True


def _orders(problem: Problem) -> list[tuple[int, ...]]:
    """Orders of micro-batches to begin with: as planned, the lightest or heaviest first, both in turn, and those with
    the least or the most to do in the first chunk."""
    costs, planned = problem.costs, tuple(range(problem.micro_batches))
    tables = (costs.forward, costs.backward_input, costs.backward_weight)
    weights = [sum(table[chunk][m] for table in tables for chunk in range(problem.chunks)) for m in planned]
    light = tuple(sorted(planned, key=lambda m: weights[m]))
    heavy = light[::-1]
    in_turn = tuple(m for pair in zip(light, heavy, strict=True) for m in pair)[: len(planned)]
    first = tuple(sorted(planned, key=lambda m: costs.forward[0][m]))
    return [planned, light, heavy, in_turn, first, first[::-1]]


def _check_caps(problem: Problem, thinnest: Schedule) -> None:
    """Raises UserError for caps that a schedule of one micro-batch at a time does not keep to."""
    if problem.caps is None:
        return
    if len(problem.caps) != problem.stages:
        raise UserError(f"caps: expected a number for each of {problem.stages} stages, found {len(problem.caps)}")
    graph = Graph(thinnest)
    for stage, (actions, cap) in enumerate(zip(thinnest, problem.caps, strict=True)):
        held = 0.0
        for action in actions:
            held += problem.costs.taken(action)
            if held > cap * (1 + SLACK):
                raise UserError(
                    f"schedule: stage {stage}, micro-batch {action.micro_batch}, action {name(action, stage)}: the "
                    f"stage may hold {cap:,.0f} bytes of activations, this micro-batch alone needs {held:,.0f}; raise "
                    "the cap, make micro-batches smaller, recompute more, or give the stage fewer layers"
                )
            held -= problem.costs.freed(action, graph)
