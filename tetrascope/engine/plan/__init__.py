"""The step plan: what happens in a step, decided before it runs, from metadata alone.

`stream` orders the samples of a mixture, `cost` weighs them, `packing` makes packs of them, `balance` deals these to
data-parallel ranks, `planner` joins the four, `report` says how well.
"""

from tetrascope.engine.plan.cost import Cost, CostFn, CostModel, row_cost
from tetrascope.engine.plan.cursor import Cursor
from tetrascope.engine.plan.planner import MicroBatchPlan, Planner, SourceIndex, StepPlan
from tetrascope.engine.plan.report import Figures, PlanReport, figures, report
from tetrascope.engine.plan.sample import SampleInfo
from tetrascope.engine.plan.stream import Draw, Source, Stream

__all__ = [
    "Cost",
    "CostFn",
    "CostModel",
    "Cursor",
    "Draw",
    "Figures",
    "MicroBatchPlan",
    "PlanReport",
    "Planner",
    "SampleInfo",
    "Source",
    "SourceIndex",
    "StepPlan",
    "Stream",
    "figures",
    "report",
    "row_cost",
]
