"""How good a plan is, and how good naive arrival order would have been with the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tetrascope.engine.plan.cost import Cost
from tetrascope.engine.plan.planner import Planner, StepPlan


@dataclass(frozen=True)
class Figures:
    """efficiency: tokens / (micro-batches · tokens that each may have). ranks, micro_batches: the largest load over the
    mean, of decoder and of vision work; 1 is perfect balance, and what there is nothing of counts as balanced."""

    efficiency: float
    ranks: Cost
    micro_batches: Cost


@dataclass(frozen=True)
class PlanReport:
    """A plan's figures, and those of its samples packed first-fit in the order of arrival, into as many packs as it
    takes (the last of which is seldom full), and dealt to the ranks in turn. Where the global batch is counted in
    samples, a micro-batch may have as many tokens as the longest one."""

    planned: Figures
    naive: Figures


def figures(planner: Planner, plan: StepPlan) -> Figures:
    """Figures of one step as it is planned."""
    infos = [planner.info(draw) for draw in plan.draws]
    dealt = [[micro.samples for micro in rank] for rank in plan.micro_batches]
    costs = [planner.cost(info) for info in infos]
    return _figures(dealt, [info.tokens for info in infos], costs, planner.batch.pack)


def report(planner: Planner, plan: StepPlan) -> PlanReport:
    """Figures of one step as it is planned, and as it would be in order of arrival."""
    infos = [planner.info(draw) for draw in plan.draws]
    tokens, costs = [info.tokens for info in infos], [planner.cost(info) for info in infos]
    ranks = len(plan.micro_batches)
    dealt = [[list(micro.samples) for micro in rank] for rank in plan.micro_batches]
    if planner.batch.pack is None:
        packs = ranks * len(dealt[0])
        naive = [list(range(number, len(tokens), packs)) for number in range(packs)]
    else:
        naive = _first_fit(tokens, planner.batch.pack)
    return PlanReport(
        _figures(dealt, tokens, costs, planner.batch.pack),
        _figures([naive[rank::ranks] for rank in range(ranks)], tokens, costs, planner.batch.pack),
    )


def _first_fit(tokens: Sequence[int], capacity: int) -> list[list[int]]:
    """As many packs as it takes."""
    packs: list[list[int]] = []
    loads: list[int] = []
    for number, length in enumerate(tokens):
        chosen = next((p for p, load in enumerate(loads) if load + length <= capacity), len(packs))
        if chosen == len(packs):
            packs.append([])
            loads.append(0)
        packs[chosen].append(number)
        loads[chosen] += length
    return packs


def _figures(
    dealt: Sequence[Sequence[Sequence[int]]], tokens: Sequence[int], costs: Sequence[Cost], capacity: int | None
) -> Figures:
    packs = [members for rank in dealt for members in rank]
    capacity = capacity or max(sum(tokens[i] for i in members) for members in packs)
    return Figures(
        efficiency=sum(tokens) / (len(packs) * capacity),
        ranks=_imbalance([[i for members in rank for i in members] for rank in dealt], costs),
        micro_batches=_imbalance(packs, costs),
    )


def _imbalance(groups: Sequence[Sequence[int]], costs: Sequence[Cost]) -> Cost:
    def ratio(kind: int) -> float:
        loads = [math.fsum(costs[i][kind] for i in members) for members in groups]
        return max(loads) * len(loads) / math.fsum(loads) if any(loads) else 1.0

    return Cost(ratio(0), ratio(1))
