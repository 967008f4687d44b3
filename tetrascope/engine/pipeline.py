"""How a model is spread over the pipeline's stages, and in which order they work: from configuration to data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tetrascope.engine import flops
from tetrascope.engine.config import ParallelSection
from tetrascope.engine.modules import ModuleOptions, first_trained
from tetrascope.engine.plan import SampleInfo
from tetrascope.engine.predict import Candidate, MicroBatchShape, Model, load_hardware, parts, prepare
from tetrascope.engine.recompute import Recompute
from tetrascope.errors import UserError
from tetrascope.models.family import Family, ModelConfig
from tetrascope.parallel.pipeline.actions import Schedule, from_text, placement_of
from tetrascope.parallel.pipeline.cost_schedule import cost_schedule
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.parallel.pipeline.partition import balanced_split, check_layers, check_split, search_split
from tetrascope.parallel.pipeline.placement import Placement, fold, loop
from tetrascope.parallel.pipeline.simulator import simulate
from tetrascope.parallel.pipeline.transforms import with_vision_chunk, without_backward
from tetrascope.parallel.pipeline.validator import validate

QUESTION_TOKENS = 256
"""Text of the typical sample, besides its picture, that the automatic cut is made for."""

TRIES = 300
"""Cuts that are simulated at most."""

COST = "cost"
"""Name of the schedule that is made for what each step's micro-batches cost."""


@dataclass(frozen=True)
class Pipeline:
    """cut: what each chunk holds. frozen: so many chunks, from the first, have nothing trained in or before them and
    no backward. schedule: None where it depends on the step."""

    cut: Cut
    frozen: int
    schedule: Schedule | None


@dataclass(frozen=True)
class Workload:
    """What the automatic cut is made for: a data-parallel rank's micro-batches, of so many typical samples each, and
    the machine, a profile's name or file."""

    micro_batches: int
    samples: int = 1
    dtype: str = "float32"
    recompute: Recompute = "none"
    hardware: str = "cpu"


def make_pipeline(
    family: Family,
    config: ModelConfig,
    options: ParallelSection,
    modules: Mapping[str, ModuleOptions],
    work: Workload,
) -> Pipeline:
    """The pipeline that a configuration asks for, proven to come to its end. Needs no process group.

    Raises UserError for an unknown schedule, a schedule file that is incomplete, would deadlock or has chunks where
    they cannot be, and a cut that leaves a chunk empty.
    """
    given = _from_file(options) if _is_file(options.schedule) else None
    if given is not None:
        _check_places(options, placement_of(given), config.decoder.tied_embeddings)
    placement = _placement(options, given)
    vision_chunk = options.schedule == COST if options.vision_chunk is None else options.vision_chunk
    counts = _given_counts(family, config, options, placement)
    if counts is None:
        counts = _best_counts(Model(family, config, modules, work.dtype), options, placement, vision_chunk, work)
    cut = Cut.of(placement, counts, vision_chunk)
    frozen = first_trained(cut, modules)
    if options.schedule == COST:
        return Pipeline(cut, frozen, None)
    schedule = given or _generated(options, work.micro_batches, vision_chunk, frozen)
    validate(schedule, work.micro_batches, frozen=frozen)
    return Pipeline(cut, frozen, schedule)


def _generated(options: ParallelSection, micro_batches: int, vision_chunk: bool, frozen: int) -> Schedule:
    schedule = GENERATORS[options.schedule](options.pp, micro_batches, options.virtual_stages)
    return without_backward(with_vision_chunk(schedule) if vision_chunk else schedule, frozen)


def _is_file(schedule: str) -> bool:
    return "/" in schedule or schedule.endswith(".txt")


def _from_file(options: ParallelSection) -> Schedule:
    path = Path(options.schedule)
    try:
        schedule = from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"parallel.schedule: {path} cannot be read ({error.strerror}); check the path") from error
    if len(schedule) != options.pp:
        raise UserError(
            f"parallel.schedule: {path} has {len(schedule)} lines of actions, parallel.pp={options.pp} stages need one "
            "each; change one of them"
        )
    return schedule


def _check_places(options: ParallelSection, found: Placement, tied: bool) -> None:
    """Raises UserError unless the ends of the model lie where the engine reads images and sums tied embeddings."""
    if options.vision_chunk and len(found) < 2:
        raise UserError(f"parallel.vision_chunk: {options.schedule} has one chunk, the encoder alone; set it to false")
    for chunk, what in [(0, "reads the images"), *([(1, "holds the token embedding")] if options.vision_chunk else [])]:
        if found and found[chunk] != 0:
            raise UserError(
                f"parallel.schedule: {options.schedule} has chunk {chunk} on stage {found[chunk]}; it {what}, which is "
                "done on stage 0: exchange the lines"
            )
    if tied and found and found[-1] not in (0, options.pp - 1):
        raise UserError(
            f"parallel.schedule: {options.schedule} has the last chunk on stage {found[-1]}; its output head is the "
            f"token embedding (tied), so that it has to be on stage 0 or {options.pp - 1}"
        )


def _placement(options: ParallelSection, given: Schedule | None) -> Placement:
    """Where the chunks are, without one for the vision encoder alone."""
    virtual, pp = options.virtual_stages, options.pp
    if given is not None:
        found = placement_of(given)
        if virtual is not None and len(found) - bool(options.vision_chunk) != virtual * pp:
            raise UserError(
                f"parallel.virtual_stages: {virtual} on {pp} stages, but {options.schedule} has {len(found)} chunks; "
                "remove virtual_stages"
            )
        return found[1:] if options.vision_chunk else found
    if options.schedule == COST:
        if options.placement == "fold":
            if virtual not in (None, 2):
                raise UserError(f"parallel.virtual_stages: {virtual}, but a fold has 2 chunks a stage; remove it")
            return fold(pp)
        return loop(pp, virtual or 1)
    if options.schedule not in GENERATORS:
        known = ", ".join([*sorted(GENERATORS), COST])
        raise UserError(
            f"parallel.schedule: unknown {options.schedule!r}; choose one of {known}, or name a file of actions, "
            "which has a / in its path or ends in .txt"
        )
    generator = GENERATORS[options.schedule]
    if generator.fixed and virtual not in (None, generator.virtual_stages):
        raise UserError(
            f"parallel.virtual_stages: {virtual}, but {options.schedule} has {generator.virtual_stages} a stage; "
            "remove it, or choose interleaved or cost"
        )
    return generator.place(pp, virtual or generator.virtual_stages)


def _given_counts(
    family: Family, config: ModelConfig, options: ParallelSection, placement: Placement
) -> list[int] | None:
    """The decoder layers of every chunk that the configuration names, checked; None where it leaves them open."""
    layers, least = config.decoder.layers, family.first_layers(config)
    check_layers(layers, len(placement), least)
    if isinstance(options.split, str):
        return None
    check_split(options.split, layers, len(placement), least)
    return options.split


def _best_counts(
    model: Model, options: ParallelSection, placement: Placement, vision_chunk: bool, work: Workload
) -> list[int]:
    """Decoder layers of every chunk, for the shortest simulated step of micro-batches of typical samples.

    Begins with the cut whose heaviest chunk is lightest. A file's schedule is weighed as the best fixed one of its
    placement, as that of `cost` is.
    """
    config, least = model.config, model.family.first_layers(model.config)
    sample = SampleInfo(config.typical.tokens + QUESTION_TOKENS, QUESTION_TOKENS, (config.typical,))
    layer = flops.layer_forward(config, [sample.tokens])
    vision = flops.vision_forward(config, [config.typical]) / layer
    head = flops.head_forward(config, sample.tokens) / layer
    start = balanced_split(config.decoder.layers, len(placement), vision, head, least)
    if len(placement) == 1:
        return start
    layout = options.layout()
    count = min(work.micro_batches, 3 * options.pp)  # more of them only lengthen the steady state
    batches = [MicroBatchShape.of([sample] * work.samples, layout)] * count
    hardware = load_hardware(work.hardware)
    pieces = parts(model, layout, work.recompute, batches, hardware)

    def seconds(counts: tuple[int, ...]) -> float:
        cut = Cut.of(placement, counts, vision_chunk)
        ready = prepare(model, Candidate(layout, cut, options.schedule, work.recompute), batches, hardware, pieces)
        if options.schedule in GENERATORS:
            schedule = _generated(options, count, vision_chunk, ready.frozen)
        else:
            schedule = cost_schedule(cut.placement, count, ready.costs, None, ready.frozen, vision_chunk, effort=0)
        return ready.seconds(simulate(schedule, ready.costs).makespan)

    return search_split(start, seconds, (least, *[1] * (len(placement) - 1)), TRIES)
