"""The pipeline schedule of a step: a fixed one, or one made for what the step's micro-batches cost."""

from __future__ import annotations

from collections.abc import Callable

from tetrascope.engine.pipeline import Pipeline
from tetrascope.engine.plan import SampleInfo, StepPlan
from tetrascope.engine.plan.stream import Draw
from tetrascope.engine.predict import Candidate, Hardware, MicroBatchShape, Model, load_hardware, prepare
from tetrascope.engine.recompute import Recompute
from tetrascope.engine.setup import Setup, profile_of
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.cost_schedule import cost_schedule, fixed_schedules
from tetrascope.parallel.pipeline.simulator import Costs, simulate

MODELLED = ("1f1b", "interleaved", "zb-v")
"""The schedules whose memory `cost` may take where nothing else is said: one of them fits any placement."""


class StepSchedules:
    """Schedules by step; a pure function of the plan, so that all ranks of a pipeline make the same.

    info: what is known of a drawn sample. memory: bytes of activations a stage may hold, None for as much as the
    fullest stage of 1F1B (or of what stands for it where a stage has several chunks) holds.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        model: Model,
        layout: Layout,
        recompute: Recompute,
        hardware: Hardware,
        memory: float | None,
        info: Callable[[Draw], SampleInfo],
    ) -> None:
        self._pipeline, self._model, self.hardware, self._info = pipeline, model, hardware, info
        self._candidate = Candidate(layout, pipeline.cut, "cost", recompute)
        self._memory = memory

    def of(self, plan: StepPlan, dp: int) -> Schedule:
        """The schedule of a data-parallel rank's pipeline.

        Raises UserError, naming stage, micro-batch and action, when the memory is too small for any.
        """
        if self._pipeline.schedule is not None:
            return self._pipeline.schedule
        cut, frozen = self._pipeline.cut, self._pipeline.frozen
        costs = self.costs(plan, dp)
        count = len(plan.micro_batches[dp])
        if self._memory is None:
            fixed = fixed_schedules(cut.placement, count, frozen, cut.vision_chunk)
            like = next(fixed[name] for name in MODELLED if name in fixed)
            most = max(simulate(like, costs).peak_bytes)
        else:
            most = self._memory
        caps = [most] * self._candidate.layout.pp
        return cost_schedule(cut.placement, count, costs, caps, frozen, cut.vision_chunk)

    def costs(self, plan: StepPlan, dp: int) -> Costs:
        """What the micro-batches of a data-parallel rank cost, by the machine's profile."""
        shapes = [
            MicroBatchShape(
                documents=tuple(info.tokens for info in infos),
                media=tuple(one for info in infos for one in info.media),
                rows=micro.rows,
            )
            for micro in plan.micro_batches[dp]
            for infos in [[self._info(plan.draws[place]) for place in micro.samples]]
        ]
        return prepare(self._model, self._candidate, shapes, self.hardware).costs


def step_schedules(setup: Setup, info: Callable[[Draw], SampleInfo]) -> StepSchedules:
    """The schedules of a run."""
    parallel, train = setup.config.parallel, setup.config.train
    return StepSchedules(
        setup.pipeline,
        Model(setup.family, setup.model_config, setup.modules, train.dtype),
        setup.layout,
        train.recompute,
        load_hardware(profile_of(setup.config)),
        None if parallel.memory_gib is None else parallel.memory_gib * 2**30,
        info,
    )
