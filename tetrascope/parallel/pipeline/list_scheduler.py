"""List scheduling: a schedule grown through time, each stage taking what its policy likes best of what is there.

A policy is a handful of rules of thumb. None is best for all costs, and one run is cheap, so that `cost_schedule`
tries many.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from tetrascope.parallel.pipeline.actions import Action, Graph, Kind, Schedule
from tetrascope.parallel.pipeline.placement import Placement
from tetrascope.parallel.pipeline.simulator import Costs

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741 (the paper's letters)

SLACK = 1e-9
"""Share by which a cap may be passed: sums of the same numbers in another order differ by rounding."""


@dataclass(frozen=True)
class Problem:
    """What is to be scheduled.

    caps: bytes that each stage may hold, as the simulator counts them; frozen: chunks, from the first, without a
    backward; vision_chunk: whether chunk 0 is the vision encoder alone.
    """

    placement: Placement
    micro_batches: int
    costs: Costs
    caps: tuple[float, ...] | None = None
    frozen: int = 0
    vision_chunk: bool = False

    @property
    def stages(self) -> int:
        return max(self.placement) + 1

    @property
    def chunks(self) -> int:
        return len(self.placement)

    def stays(self, chunk: int) -> bool:
        """Whether what a chunk gives the next one, or gets back from it, stays on its stage."""
        return self.placement[chunk] == self.placement[chunk + 1]


@dataclass(frozen=True)
class Policy:
    """How a stage chooses.

    order: micro-batches in the order in which the first chunk takes them.
    priority: what is taken first, by letters. b: a backward for whose gradient another chunk waits; t: one that
    nothing waits for; f: a forward; v: the vision encoder for a later micro-batch than the next; w: gradients of
    weights.
    split: backwards in two parts, but for the last, for which nothing waits.
    ahead: micro-batches that the vision encoder may be ahead of the chunk after it.
    deep: of two forwards the one nearer the output, of two backwards the one nearer the input; else the other way.
    patience: a stage does nothing if something that it would rather do arrives before this share of the time of what
    it could do.
    reserve: a micro-batch begins only when all its activations find room on all stages. Memory then never ends in a
    deadlock, but some of it is unused where stages have several chunks.
    queue: transfers that may wait for a stage when the next to it begins. 0: so one buffer is always enough (see
    `validate`). 1: then too, but the sender does nothing while there are two. None: any number; some schedules turn
    out to need one buffer only all the same.
    """

    order: tuple[int, ...]
    priority: str = "bftvw"
    split: bool = False
    ahead: int = 1
    deep: bool = True
    patience: float = 0.0
    reserve: bool = False
    queue: int | None = 0


@dataclass(frozen=True)
class Run:
    """A schedule as a policy makes it, and its makespan."""

    schedule: Schedule
    makespan: float


_Item = tuple[float, float, int, int]
"""Something to do: when it can be begun as the policy goes, and as soon as could be; micro-batch, chunk."""


def one_by_one(problem: Problem) -> Schedule:
    """Each micro-batch forward and back through all chunks before the next: no schedule holds less on any stage."""
    lines: list[list[Action]] = [[] for _ in range(problem.stages)]
    for m in range(problem.micro_batches):
        for chunk in range(problem.chunks):
            lines[problem.placement[chunk]].append(Action(F, m, chunk))
        for chunk in range(problem.chunks - 1, problem.frozen - 1, -1):
            lines[problem.placement[chunk]].append(Action(B, m, chunk))
    return tuple(map(tuple, lines))


class ListScheduler:
    """Runs policies over one problem."""

    def __init__(self, problem: Problem) -> None:
        costs, chunks, rows = problem.costs, range(problem.chunks), range(problem.micro_batches)
        graph = Graph(one_by_one(problem))
        self.problem = problem
        self.seconds = {k: [[costs.seconds(Action(k, m, c)) for m in rows] for c in chunks] for k in Kind}
        self.taken = [[costs.taken(Action(F, m, c)) for m in rows] for c in chunks]
        self.freed = {k: [[costs.freed(Action(k, m, c), graph) for m in rows] for c in chunks] for k in Kind}
        self.work = [sum(map(costs.seconds, actions)) for actions in one_by_one(problem)]
        self.send = [costs.transfer(m) for m in rows]
        caps = problem.caps or [float("inf")] * problem.stages
        self.caps = [cap * (1 + SLACK) for cap in caps]
        self.needs = [
            [sum(self.taken[c][m] for c in chunks if problem.placement[c] == s) for s in range(problem.stages)]
            for m in rows
        ]
        """Bytes of all activations of a micro-batch, by stage."""
        self.least = max(self._head(stage) + work for stage, work in enumerate(self.work))
        """No makespan is less: a stage has its work to do when the first micro-batch has come to it."""

    def _head(self, stage: int) -> float:
        """The time that a micro-batch needs at least to come to a stage."""
        place = self.problem.placement
        before = range(place.index(stage))
        borders = sum(place[chunk] != place[chunk + 1] for chunk in before)
        return min(
            sum(self.seconds[F][chunk][m] for chunk in before) + borders * self.send[m] for m in range(len(self.send))
        )

    def run(self, policy: Policy, limit: float = float("inf")) -> Run | None:
        """None when the makespan cannot be less than `limit`, or when the policy ends in a deadlock: memory or queues
        are full, and what would free them cannot be done.

        The schedule is valid, but with `queue` None may need more than one buffer, and within the caps.
        """
        return _Simulation(self, policy, limit).result()


class _Simulation:
    """One policy on its way through time."""

    def __init__(self, tables: ListScheduler, policy: Policy, limit: float) -> None:
        problem = tables.problem
        self.limit, self.slack = limit, [limit - work for work in tables.work]
        stages = range(problem.stages)
        self.tables, self.problem, self.policy = tables, problem, policy
        self.rank = {letter: at for at, letter in enumerate(policy.priority)}
        self.lines: list[list[Action]] = [[] for _ in stages]
        self.free_at = [0.0] * problem.stages
        self.soonest_free = [0.0] * problem.stages
        self.held = [0.0] * problem.stages
        self.promised = [0.0] * problem.stages
        self.unfinished = [2 * problem.chunks - problem.frozen] * problem.micro_batches  # I and W count once
        self.in_flight = 0
        self._make_queues()
        self.forwards[0].extend((0.0, 0.0, m, 0) for m in policy.order)
        self.blocked: list[deque[_Item] | None] = [None] * problem.stages
        self.events: list[tuple[float, int]] = [(0.0, stage) for stage in stages]

    def _make_queues(self) -> None:
        """What a stage can do next is at the head of a queue, one for each neighbour and direction: transfers come in
        the order in which they are wanted. Inside a stage there is one for each chunk and direction."""
        place = self.problem.placement
        found: dict[tuple[bool, int, int, int], deque[_Item]] = {}
        self.queues: list[list[tuple[bool, deque[_Item]]]] = [[] for _ in range(self.problem.stages)]
        self.weights: list[deque[_Item]] = [deque() for _ in range(self.problem.stages)]

        def queue(forward: bool, chunk: int, source: int | None) -> deque[_Item]:
            here = place[chunk]
            key = (forward, here, -1, chunk) if source is None or source == here else (forward, here, source, -1)
            if key not in found:
                found[key] = deque()
                self.queues[here].append((forward, found[key]))
            return found[key]

        chunks = range(self.problem.chunks)
        self.forwards = [queue(True, c, place[c - 1] if c else None) for c in chunks]
        self.backwards = [queue(False, c, place[c + 1] if c + 1 < len(chunks) else None) for c in chunks]

    def result(self) -> Run | None:
        while self.events and min(self.slack) > 0:
            now, stage = heapq.heappop(self.events)
            if self.free_at[stage] <= now:
                self._choose(stage, now)
        if any(self.unfinished):
            return None
        return Run(tuple(map(tuple, self.lines)), max(self.soonest_free))

    def _choose(self, stage: int, now: float) -> None:
        """Begins what the stage likes best of what is there, if anything."""
        blocked = self.blocked[stage]
        if blocked is not None and len(blocked) > 1:
            return
        coming: list[tuple[int, float]] = []
        best: tuple[int, int] | None = None
        kind, chosen = W, self.weights[stage]
        if chosen:
            best = (self.rank["w"], 0)
        for forward, queue in self.queues[stage]:
            if not queue:
                continue
            ready, _, m, chunk = queue[0]
            letter = self._forward_letter(m, chunk) if forward else self._backward_letter(chunk)
            if letter is None:
                continue
            key = (self.rank[letter], -chunk if forward == self.policy.deep else chunk)
            if ready > now:
                coming.append((key[0], ready))
            elif best is None or key < best:
                best, kind, chosen = key, self._backward_kind(chunk) if not forward else F, queue
        if best is None:
            return
        if self.policy.patience and coming:
            _, _, m, chunk = chosen[0]
            until = now + self.policy.patience * self.tables.seconds[kind][chunk][m]
            if any(rank < best[0] and ready < until for rank, ready in coming):
                return
        self._begin(stage, now, kind, chosen)

    def _backward_kind(self, chunk: int) -> Kind:
        return I if self.policy.split and chunk > self.problem.frozen else B

    def _backward_letter(self, chunk: int) -> str | None:
        if chunk == self.problem.frozen:
            return "t"
        return None if self._full(self.backwards[chunk - 1], self.problem.stays(chunk - 1)) else "b"

    def _forward_letter(self, m: int, chunk: int) -> str | None:
        """None: there is no room for it."""
        problem, taken = self.problem, self.tables.taken
        stage, cap = problem.placement[chunk], self.tables.caps[problem.placement[chunk]]
        if self.held[stage] + taken[chunk][m] > cap:
            return None
        if chunk + 1 < problem.chunks and self._full(self.forwards[chunk + 1], problem.stays(chunk)):
            return None
        if chunk:
            return "f"
        if self.policy.reserve and not self._can_promise(m):
            return None
        if not (problem.vision_chunk and problem.chunks > 1):
            return "f"
        ahead = self.forwards[1]
        if not ahead:
            return "f"
        if len(ahead) >= self.policy.ahead:
            return None
        # What has been encoded must be able to go on one by one, once everything else is gone.
        waiting = [*(item[2] for item in ahead), m]
        needed = sum(taken[0][n] for n in waiting) + max(taken[1][n] for n in waiting)
        return "v" if needed <= cap else None

    def _full(self, queue: deque[_Item], stays: bool) -> bool:
        return self.policy.queue is not None and not stays and len(queue) > self.policy.queue

    def _can_promise(self, m: int) -> bool:
        needs = self.tables.needs[m]
        return not self.in_flight or all(
            held + need <= cap for held, need, cap in zip(self.promised, needs, self.tables.caps, strict=True)
        )

    def _begin(self, stage: int, now: float, kind: Kind, queue: deque[_Item]) -> None:
        """Takes the head of a queue, and leaves what comes of it where it is wanted."""
        _, soonest, m, chunk = queue.popleft()
        action = Action(kind, m, chunk)
        seconds = self.tables.seconds[kind][chunk][m]
        soonest = max(soonest, self.soonest_free[stage])
        self.slack[stage] -= soonest - self.soonest_free[stage]
        end, soonest = now + seconds, soonest + seconds
        self.lines[stage].append(action)
        self.free_at[stage], self.soonest_free[stage] = end, soonest
        heapq.heappush(self.events, (end, stage))
        self.blocked[stage] = None
        self._hold_and_free(stage, action)
        if self.policy.reserve:
            heapq.heappush(self.events, (end, self.problem.placement[0]))  # it may wait for room on this stage
        frozen, last = self.problem.frozen, self.problem.chunks - 1
        self.in_flight += kind is F and chunk == 0
        self.unfinished[m] -= kind is not I
        self.in_flight -= self.unfinished[m] == 0
        if kind is I:
            self.weights[stage].append((end, soonest, m, chunk))
        if kind is F:
            self._tell_sender(now, stage, chunk - 1)
            if chunk < last:
                self._hand_on(self.forwards, stage, chunk + 1, m, end, soonest)
            elif chunk >= frozen:
                self.backwards[chunk].append((end, soonest, m, chunk))
        elif kind is not W:
            self._tell_sender(now, stage, chunk + 1)
            if chunk > frozen:
                self._hand_on(self.backwards, stage, chunk - 1, m, end, soonest)

    def _hand_on(self, queues: list[deque[_Item]], stage: int, chunk: int, m: int, end: float, soonest: float) -> None:
        there = self.problem.placement[chunk]
        travel = 0 if there == stage else self.tables.send[m]
        queues[chunk].append((end + travel, soonest + travel, m, chunk))
        if there != stage:
            heapq.heappush(self.events, (end + travel, there))
            self.blocked[stage] = None if self.policy.queue is None else queues[chunk]

    def _tell_sender(self, now: float, stage: int, chunk: int) -> None:
        """A place in the queue from another stage's chunk is free."""
        if 0 <= chunk < self.problem.chunks and (sender := self.problem.placement[chunk]) != stage:
            heapq.heappush(self.events, (now, sender))

    def _hold_and_free(self, stage: int, action: Action) -> None:
        """What the stage holds when the action has ended; that there is room for it was seen before."""
        kind, m, chunk = action.kind, action.micro_batch, action.chunk
        if kind is F and chunk == 0 and self.policy.reserve:
            self.promised = [held + need for held, need in zip(self.promised, self.tables.needs[m], strict=True)]
        freed = self.tables.freed[kind][chunk][m]
        self.held[stage] += (self.tables.taken[chunk][m] if kind is F else 0) - freed
        self.promised[stage] -= freed
