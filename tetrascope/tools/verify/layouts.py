"""The layouts a family is verified in, and how a layout is written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tetrascope.errors import UserError
from tetrascope.parallel.mesh import AXES, Layout


@dataclass(frozen=True)
class Row:
    """One row of the certificate: a layout, micro-batches per data-parallel rank, and a pipeline schedule."""

    layout: Layout
    micro_batches: int
    schedule: str


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
)
"""Every axis alone, each pair, all three; more micro-batches than stages and fewer."""


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
