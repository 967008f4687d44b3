"""What a search found, for reading: rows of a table, what was left out, and the lines that set a choice in a config."""

from __future__ import annotations

import math
from itertools import groupby

from rich.table import Table

from tetrascope.engine.pipeline import COST
from tetrascope.tools.plan.search import Found, Outcome

COLUMNS = (
    "",
    "layout",
    "schedule",
    "layers",
    "micro-batches",
    "recompute",
    "step, s",
    "tokens/s/GPU",
    "MFU, %",
    "bubble, %",
    "peak, GiB",
)

REASONS = 8
"""Reasons that are named, at most."""


def row(number: int, found: Found) -> tuple[str, ...]:
    """A line of the table; see COLUMNS."""
    one = found.prediction
    return (
        str(number),
        str(found.variant.layout),
        str(found.pipelining),
        cut(found.counts),
        micro_batches(found),
        found.variant.recompute,
        f"{one.seconds:.3f}",
        f"{one.tokens_per_second_per_gpu:,.0f}",
        f"{100 * one.mfu:.1f}",
        f"{100 * one.timeline.bubble_share:.1f}",
        f"{max(one.peak_bytes) / 2**30:.1f}",
    )


def table(outcome: Outcome, title: str) -> Table:
    """All of what was found, the fastest first."""
    made = Table(title=title)
    for column in COLUMNS:
        made.add_column(column, justify="left" if column in ("layout", "schedule", "layers") else "right")
    for number, found in enumerate(outcome.ranked, start=1):
        made.add_row(*row(number, found))
    return made


def cut(counts: tuple[int, ...]) -> str:
    """Decoder layers of the chunks, runs of equal ones in short: 17 21×3."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return " ".join(f"{count}×{times}" if times > 1 else str(count) for count, times in runs)


def micro_batches(found: Found) -> str:
    """How many on each rank, of what size."""
    batch, count = found.variant.batch, len(found.variant.samples)
    if batch.pack is not None:
        return f"{count} of {batch.pack:,} tokens"
    per = (batch.samples or 0) / (found.variant.layout.dp * count)
    return f"{count} of {per:.3g} sample{'' if per == 1 else 's'}"


def left_out(outcome: Outcome) -> list[str]:
    """What was not predicted, and why, in lines."""
    lines = []
    if outcome.excess:
        lines.append(f"{len(outcome.excess):,} do not fit in memory; the closest is {outcome.excess[0]}")
    ordered = sorted(outcome.rejected.values(), key=lambda one: -one.count)
    for one in ordered[:REASONS]:
        others = f" and {one.count - 1:,} other{'' if one.count == 2 else 's'}" if one.count > 1 else ""
        lines.append(f"{one.first}{others}: {one.reason}")
    if more := ordered[REASONS:]:
        lines.append(f"{sum(one.count for one in more):,} layouts for {len(more):,} other reasons")
    if outcome.slower:
        lines.append(f"{outcome.slower:,} cannot be among the best, even without any bubble")
    return lines


def settings(found: Found, hardware: str) -> str:
    """The lines of YAML that set a choice in a configuration. hardware: profile or file that it was made for."""
    layout, batch = found.variant.layout, found.variant.batch
    axes = ", ".join(f"{axis}: {getattr(layout, axis)}" for axis in ("tp", "pp", "dp", "ring", "ulysses"))
    size = (
        f"tokens: {batch.tokens}, pack: {batch.pack}"
        if batch.pack is not None
        else f"samples: {batch.samples}, micro_batches: {batch.micro_batches}"
    )
    how = f"schedule: {found.pipelining.schedule}, virtual_stages: {found.pipelining.virtual_stages}"
    if found.pipelining.schedule == COST:
        room = math.floor(found.room / 2**30 * 100) / 100
        where = "fold" if found.pipelining.folded else "loop"
        how += f", placement: {where}, vision_chunk: true, memory_gib: {room}, hardware: {hardware}"
    return (
        f"parallel: {{{axes}, {how}, split: {list(found.counts)}}}\n"
        f"batch: {{{size}, loss: {batch.loss}}}\n"
        f"train: {{recompute: {found.variant.recompute}}}  # beside what it has"
    )
