"""The layouts a family is verified in, and how a layout is written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tetrascope.engine.config import ParallelSection
from tetrascope.engine.recompute import Recompute
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import AXES, Layout


@dataclass(frozen=True)
class Row:
    """One row of the certificate: a layout, micro-batches per data-parallel rank, a pipeline schedule, and what of
    `ParallelSection` and `TrainSection` goes with it."""

    layout: Layout
    micro_batches: int
    schedule: str
    virtual_stages: int | None = None
    vision_chunk: bool | None = None
    placement: Literal["loop", "fold"] = "loop"
    recompute: Recompute = "none"
    loss_rows: int | None = None
    mlp_rows: int | None = None

    @property
    def parallel(self) -> ParallelSection:
        """The row as a configuration says it."""
        axes = self.layout
        return ParallelSection(
            pp=axes.pp,
            dp=axes.dp,
            ring=axes.ring,
            ulysses=axes.ulysses,
            tp=axes.tp,
            schedule=self.schedule,
            virtual_stages=self.virtual_stages,
            vision_chunk=self.vision_chunk,
            placement=self.placement,
        )


ROWS = (
    Row(Layout(), 1, "1f1b"),
    Row(Layout(), 3, "1f1b"),
    Row(Layout(tp=2), 2, "1f1b"),
    Row(Layout(pp=2), 4, "1f1b"),
    Row(Layout(pp=2), 3, "gpipe"),
    Row(Layout(pp=4), 3, "1f1b"),
    Row(Layout(dp=2), 2, "1f1b"),
    Row(Layout(tp=2, pp=2), 4, "1f1b"),
    Row(Layout(tp=2, dp=2), 2, "1f1b"),
    Row(Layout(pp=2, dp=2), 4, "1f1b"),
    Row(Layout(dp=4), 2, "1f1b"),
    Row(Layout(tp=2, pp=2, dp=2), 4, "1f1b"),
    Row(Layout(pp=2), 3, "interleaved"),
    Row(Layout(pp=4), 3, "zb-h1"),
    Row(Layout(pp=2), 4, "zb-v", vision_chunk=True),
    Row(Layout(tp=2, pp=2), 4, "cost", recompute="full"),
    Row(Layout(ring=2), 2, "1f1b"),
    Row(Layout(ulysses=2), 2, "1f1b"),
    Row(Layout(ring=2, ulysses=2), 3, "1f1b", recompute="full", loss_rows=16, mlp_rows=16),
    Row(Layout(ring=2, tp=2, pp=2), 3, "zb-v"),
    Row(Layout(ulysses=2, dp=2, pp=2), 2, "cost"),
)
"""Every axis alone, pairs and more of them; more micro-batches than stages and fewer; the schedules."""


def parse_layouts(text: str, samples: int) -> list[Row]:
    """Layouts such as `tp2,pp2dp2,tp2xpp2`, under 1F1B with up to four micro-batches each.

    samples: in a global batch, which must fill the micro-batches. Raises UserError for an unknown axis or form, or
    for more data-parallel ranks than samples.
    """
    rows = []
    for word in text.lower().replace("×", "x").split(","):
        parts = re.findall(r"([a-z]+)(\d+)", word.replace("x", " "))
        if not parts or "".join(a + n for a, n in parts) != re.sub(r"[x\s]", "", word):
            raise UserError(f"--layouts: {word!r} is no layout; write axes with sizes, as in tp2,pp2,tp2xpp2")
        sizes = {axis: int(size) for axis, size in parts}
        unknown = sorted(set(sizes) - set(AXES))
        if unknown or 0 in sizes.values():
            raise UserError(f"--layouts: {word!r}: axes are {', '.join(AXES)}, sizes at least 1")
        layout = Layout(**sizes)
        if layout.dp > samples:
            raise UserError(f"--layouts: {word!r}: {samples} samples a step cannot feed {layout.dp} ranks")
        rows.append(Row(layout, min(4, samples // layout.dp), "1f1b"))
    return rows
