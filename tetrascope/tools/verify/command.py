"""`tetrascope verify FAMILY`."""

from __future__ import annotations

import json
import os

from rich.console import Console

from tetrascope.engine.build import check_layout
from tetrascope.errors import UserError
from tetrascope.models.family import get_family
from tetrascope.tools.verify.case import Case
from tetrascope.tools.verify.certificate import Verdict, certify, table
from tetrascope.tools.verify.families import get_oracle
from tetrascope.tools.verify.layouts import ROWS, parse_layouts
from tetrascope.tools.verify.pool import WorkerPool


def verify(family: str, layouts: str | None, world: int, as_json: bool) -> int:
    """Prints the certificate; returns 0 when every row holds, else 1.

    layouts: comma-separated, None for all. world: most ranks to start; rows that need more are left out when they
    come from the built-in list. Raises UserError for an unknown family or layout, or one that needs more ranks.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    oracle = get_oracle(family)
    cases: dict[str, Case] = oracle.variants()
    samples = min(case.batch for case in cases.values())
    rows = list(ROWS) if layouts is None else parse_layouts(layouts, samples)
    if layouts is None:
        rows = [row for row in rows if row.layout.world <= world]
    for row in rows:
        for case in cases.values():
            check_layout(get_family(family), case.config, row.layout)
        if row.layout.world > world:
            raise UserError(f"--layouts: {row.layout} needs {row.layout.world} ranks; raise --world from {world}")
    console = Console(stderr=True)

    def told(verdict: Verdict) -> None:
        mark = "ok    " if verdict.passed else "FAILED"
        console.print(
            f"{mark}  {verdict.case} {verdict.layout} m={verdict.micro_batches} {verdict.schedule}", highlight=False
        )
        if verdict.failure:
            console.print(verdict.failure, highlight=False, markup=False)

    with WorkerPool(size=max(row.layout.world for row in rows)) as pool:
        verdicts = certify(oracle, cases, rows, pool, told)
    if as_json:
        print(json.dumps({"family": family, "rows": [verdict.to_json() for verdict in verdicts]}, indent=1))
    else:
        Console().print(table(family, verdicts))
    return 0 if all(verdict.passed for verdict in verdicts) else 1
