"""`tetrascope data index`, `tetrascope data inspect` and `tetrascope data plan`."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from tetrascope.engine.data.skipped import Skip, SkipLog
from tetrascope.engine.modules import trained
from tetrascope.engine.plan import CostModel, Planner, report
from tetrascope.engine.setup import open_data, prepare
from tetrascope.errors import UserError
from tetrascope.tools.data.histogram import bars
from tetrascope.tools.data.html import page
from tetrascope.tools.data.preview import choose, in_terminal, preview, printable
from tetrascope.tools.data.sources import Indexed, load_run, open_sources, progress_bar
from tetrascope.tools.data.statistics import Statistics, statistics
from tetrascope.tools.plan.mixed import table


def data_index(path: Path, overrides: list[str], base: Path | None, source: str | None, workers: int | None) -> int:
    """Indexes every source of the configuration at `path`, or the one called `source`, and says what it found.

    base: the configuration, where `path` is a data file. workers: processes, None for data.index_workers. Returns 1
    when more samples cannot be used than data.max_bad_samples allows, else 0.

    Raises UserError for whatever `tetrascope train` would refuse of configuration, tokenizer and model, and for a
    source that cannot be read or has no usable sample.
    """
    config = load_run(path, overrides, base)
    if workers is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"index_workers": workers})})
    setup = prepare(config, None)
    with progress_bar() as progress:
        found = open_sources(setup, progress, source)
    cost = CostModel(setup.model_config, trained(setup.modules))
    console, errors = Console(), Console(stderr=True)
    for one in found:
        for line in describe(one, statistics(one.name, [one.index], cost)):
            console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    log = SkipLog(None, sum(len(one.part.source) for one in found), config.data.max_bad_samples)
    try:
        log.add(Skip(bad.kind, one.name, bad.number, bad.reason) for one in found for bad in one.index.bad)
    except UserError as error:
        errors.print(printable(str(error)), style="bold red", highlight=False, markup=False, soft_wrap=True)
        return 1
    return 0


def describe(one: Indexed, counted: Statistics) -> list[str]:
    """What there is to say of a source and its index, in lines."""
    lines = [
        f"{one.name}: {counted.samples:,} samples, {counted.tokens:,} tokens ({counted.supervised:,} supervised, "
        f"{counted.visual:,} visual), {counted.images:,} images, {counted.videos:,} videos"
    ]
    if counted.bad:
        lines.append(f"  left out: {len(counted.bad):,} ({_kinds(counted)})")
        lines += [f"    {_first(counted, kind)}" for kind in counted.bad_kinds]
    if not one.made:
        how = f"found unchanged in {one.seconds:.1f} s"
    elif one.earlier is not None:
        when = one.earlier.strftime("%Y-%m-%d %H:%M:%S")
        how = f"content or settings changed since {when}, indexed again in {one.seconds:.1f} s"
    else:
        how = f"made in {one.seconds:.1f} s"
    return [*lines, f"  index: {one.file} ({one.file.stat().st_size / 1024:,.1f} KiB), {how}"]


def _kinds(counted: Statistics) -> str:
    return ", ".join(f"{kind}: {count:,}" for kind, count in counted.bad_kinds.items())


def _first(counted: Statistics, kind: str) -> str:
    return f"{kind}, first: {next(bad.reason for bad in counted.bad if bad.kind == kind)}"


def data_inspect(path: Path, overrides: list[str], html: Path | None, samples: int, seed: int) -> int:
    """Prints statistics of every source, and so many samples drawn at random; writes them to `html` too.

    Raises UserError as `data_index` does, and when the file cannot be written.
    """
    setup = prepare(load_run(path, overrides, None), None)
    with progress_bar() as progress:
        sources = open_sources(setup, progress)
    cost = CostModel(setup.model_config, trained(setup.modules))
    found = [statistics(one.name, [one.index], cost) for one in sources]
    if len(found) > 1:
        found.insert(0, statistics("all sources", [one.index for one in sources], cost))
    visual_ids = setup.family.visual_ids(setup.model_config)
    chosen = choose([len(one.index) for one in sources], samples, seed)
    previews = [
        preview(sources[number], place, setup.tokenizer, visual_ids, pictures=html is not None)
        for number, place in chosen
    ]
    console = Console()
    for one in found:
        console.rule(printable(one.name), style="bold")
        for measure in one.measures:
            console.print(bars(measure))
            console.print()
        if one.bad:
            line = f"left out: {len(one.bad):,} ({_kinds(one)})"
            console.print(printable(line), style="red", highlight=False, markup=False, soft_wrap=True)
    for shown in previews:
        console.rule()
        console.print(in_terminal(shown), soft_wrap=True)
    if html is not None:
        _write(html, page(f"Training data of {path}", found, previews))
        console.print(f"wrote {html}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {file} cannot be written ({error.strerror}); give another file") from error


def data_plan(path: Path, overrides: list[str], dp: int | None, steps: int) -> int:
    """Plans the first steps of a run from its index and prints how evenly work is spread, beside arrival order.

    dp: data-parallel ranks, None for the configuration's. Raises UserError for whatever `tetrascope train` refuses.
    """
    config = load_run(path, [*overrides, *([] if dp is None else [f"parallel.dp={dp}"])], None)
    setup = prepare(config, None)
    with progress_bar() as progress:
        mixture = open_data(setup, progress)
    cost = CostModel(setup.model_config, trained(setup.modules))
    planner = Planner(mixture.for_planner(), config.train.seed, setup.layout, config.batch, cost)
    began = time.perf_counter()
    plans = [planner.plan(step) for step in range(steps)]
    seconds = time.perf_counter() - began
    shown = table([report(planner, plan) for plan in plans])
    per_rank = config.batch.per_rank(setup.layout.dp)
    limit = "" if config.batch.pack is None else f" of at most {config.batch.pack} tokens"
    shown.title = f"{steps} steps, DP {setup.layout.dp}, {per_rank} micro-batches{limit} a rank"
    console = Console()
    console.print(shown)
    count = sum(len(plan.draws) for plan in plans)
    console.print(f"{count} samples planned in {1000 * seconds / count:.3f} ms each", highlight=False)
    epochs = ", ".join(
        f"{source.name} {gone:.2f}" for source, gone in zip(planner.sources, plans[-1].epochs, strict=True)
    )
    console.print(f"gone through: {epochs} times", highlight=False, markup=False, soft_wrap=True)
    return 0
