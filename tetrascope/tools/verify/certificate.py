"""The parity certificate: one row a layout, with the largest errors against one process of the reference.

Bounds. All numbers are fp32, unit roundoff u = 6e-8. A logit comes out of some 40 matrix products in a row, each a
sum of about 100 terms: random rounding leaves √(40·100)·u ≈ 4e-6 of the largest: bound 1e-5. The loss is a mean over
some hundred tokens of values of size 1 to 10 and agrees to a few u: bound 1e-6. A gradient element is a sum of up to
(tokens x width) ≈ 1e4 products taken in another order; random rounding leaves √1e4·u ≈ 6e-6 of the tensor's largest
element: bound 1e-5. A weight moves by AdamW's lr·m/(√v + eps); with gradients clipped to norm 1 that magnifies a
relative gradient error by at most 1 + 1/eps = 101 (see case.py): bound 1e-5 · 101 ≈ 1e-3 of the tensor's largest
change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from tetrascope.tools.verify.case import Case, Numbers
from tetrascope.tools.verify.layouts import Row
from tetrascope.tools.verify.pool import RankFailure, WorkerPool
from tetrascope.tools.verify.run import compare, global_batches, logits_error, relative_losses, run_layout

LOGIT_BOUND = 1e-5
LOSS_BOUND = 1e-6
GRADIENT_BOUND = 1e-5
WEIGHT_BOUND = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Errors of a case in a layout; failure holds what a rank reported when it could not be run."""

    case: str
    layout: str
    micro_batches: int
    schedule: str
    logit_error: float
    loss_error: float
    gradient_error: float
    gradient_name: str
    weight_error: float
    weight_name: str
    failure: str = ""

    @property
    def passed(self) -> bool:
        return (
            not self.failure
            and self.logit_error <= LOGIT_BOUND
            and self.loss_error <= LOSS_BOUND
            and self.gradient_error <= GRADIENT_BOUND
            and self.weight_error <= WEIGHT_BOUND
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the verdict."""
        return {**asdict(self), "passed": self.passed}


def verify_row(pool: WorkerPool, name: str, case: Case, expected: Numbers, row: Row) -> Verdict:
    """Trains the case in one layout and compares every copy of every tensor on every rank with the reference.

    Raises RankFailure when a rank fails.
    """
    ranks = pool.run(run_layout, case, row, world=row.layout.world)
    rules = case.yardsticks
    gradients = compare([s for rank in ranks for s in rank.gradients], expected.gradients, yardsticks=rules)
    weights = compare([s for rank in ranks for s in rank.weights], expected.weights, case.weights, rules)
    worst_gradient = max(gradients, key=gradients.__getitem__)
    worst_weight = max(weights, key=weights.__getitem__)
    return Verdict(
        name,
        *_labels(row),
        logit_error=logits_error([part for rank in ranks for part in rank.logits], expected),
        loss_error=max(relative_losses(rank.losses, expected) for rank in ranks),
        gradient_error=gradients[worst_gradient],
        gradient_name=worst_gradient,
        weight_error=weights[worst_weight],
        weight_name=worst_weight,
    )


def certify(
    oracle: Any,
    cases: dict[str, Case],
    rows: list[Row],
    pool: WorkerPool,
    on_row: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Verifies a family in every layout; `on_row` is told each verdict as it comes."""
    verdicts = []
    for name, case in cases.items():
        expected: Numbers = oracle.reference(case, global_batches(case))
        for row in rows:
            try:
                verdict = verify_row(pool, name, case, expected, row)
            except RankFailure as failure:
                none = float("inf")
                verdict = Verdict(name, *_labels(row), none, none, none, "", none, "", failure=str(failure))
            verdicts.append(verdict)
            on_row(verdict)
    return verdicts


def _labels(row: Row) -> tuple[str, int, str]:
    return str(row.layout), row.micro_batches, row.schedule


def table(family: str, verdicts: list[Verdict]) -> Table:
    """The certificate for the terminal."""
    title = f"{family} against transformers in one process, fp32: logits, loss, gradients, weights after 3 AdamW steps"
    out = Table(title=title, box=SIMPLE, padding=(0, 1))
    for column in ("case", "layout", "m", "schedule", "logits", "loss", "grads", "weights", "verdict"):
        out.add_column(column, no_wrap=True)
    for v in verdicts:
        errors = (v.logit_error, v.loss_error, v.gradient_error, v.weight_error)
        out.add_row(
            v.case,
            v.layout,
            str(v.micro_batches),
            v.schedule,
            *(f"{error:.1e}" for error in errors),
            "[green]equal[/green]" if v.passed else "[red]FAILED[/red]",
        )
    bounds = {"logits": LOGIT_BOUND, "loss": LOSS_BOUND, "gradients": GRADIENT_BOUND, "weights": WEIGHT_BOUND}
    out.caption = "bounds: " + ", ".join(f"{what} {bound:.0e}" for what, bound in bounds.items())
    gradient = max(verdicts, key=lambda v: v.gradient_error)
    weight = max(verdicts, key=lambda v: v.weight_error)
    out.caption += f"\nlargest gradient error: {gradient.gradient_name}\nlargest weight error: {weight.weight_name}"
    return out
