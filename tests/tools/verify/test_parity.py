"""Every layout computes what one process of transformers computes.

The oracle shares no code with the engine: transformers' own model, its own positions, one sample at a time without
packing, torch's own clip and AdamW. A loss divided by the wrong count shows in the loss; a gradient that was averaged
instead of summed, summed twice or not at all over any axis shows as a factor in the gradients of the tensors it
concerns; a norm that counts a replicated or tied tensor more than once changes the clipping and shows in the weights;
so does an optimizer share that is updated with another's moments. Bounds and their reasons: certificate.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tetrascope.models.weights import rename
from tetrascope.tools.verify.case import Case, Numbers
from tetrascope.tools.verify.certificate import Verdict, verify_row
from tetrascope.tools.verify.families import ORACLES, get_oracle
from tetrascope.tools.verify.layouts import ROWS, Row
from tetrascope.tools.verify.pool import WorkerPool
from tetrascope.tools.verify.run import global_batches

VARIANTS: dict[str, tuple[str, ...]] = {
    "qwen2_vl": ("untied", "tied"),
    "qwen2_5_vl": ("untied", "tied"),
    "qwen3_vl": ("untied", "tied"),
    "llava_onevision": ("untied", "tied"),
    "llava": ("published", "v2pe"),
    "internvl": ("qwen2", "internlm2", "v2pe"),
    "longvila": ("untied", "tied", "linear"),
}
"""The certificate's cases by family."""

CASES = [(family, name) for family, names in VARIANTS.items() for name in names]


def test_every_case_of_every_family_is_tried() -> None:
    assert {family: tuple(get_oracle(family).variants()) for family in ORACLES} == VARIANTS


@functools.cache
def _reference(family: str, name: str) -> tuple[Case, Numbers]:
    oracle: Any = get_oracle(family)
    case: Case = oracle.variants()[name]
    return case, oracle.reference(case, global_batches(case))


def _verify(pool: WorkerPool, family: str, name: str, row: Row) -> Verdict:
    case, expected = _reference(family, name)
    return verify_row(pool, name, case, expected, row)


PLAIN = [row for row in ROWS if row.schedule in ("1f1b", "gpipe") and row.layout.ring * row.layout.ulysses == 1]
"""Rows for every case; the others, of which more are tried elsewhere, for one of each family and those with V2PE."""

TRIED = [(*case, row) for row in PLAIN for case in CASES] + [
    (family, name, row)
    for row in ROWS
    if row not in PLAIN
    for family, names in VARIANTS.items()
    for name in names
    if name in (names[0], "v2pe")
]


@pytest.mark.parametrize(
    ("family", "name", "row"),
    TRIED,
    ids=lambda value: f"{value.layout}-m{value.micro_batches}-{value.schedule}" if isinstance(value, Row) else value,
)
def test_layout_equals_one_process(pool: WorkerPool, family: str, name: str, row: Row) -> None:
    verdict = _verify(pool, family, name, row)
    assert verdict.passed, verdict


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_are_large_enough_to_compare(family: str, name: str) -> None:
    """No tensor's gradient is so small that its error could not be seen against the rounding of others.

    Those with a yardstick are: nothing but rounding.
    """
    case, expected = _reference(family, name)
    sizes = {tensor: grad.abs().max().item() for tensor, grad in expected.gradients.items()}
    measures = {tensor: rename(tensor, case.yardsticks) for tensor in sizes}
    own = {tensor: size for tensor, size in sizes.items() if measures[tensor] == tensor}
    assert min(own.values()) > 1e-4 * max(own.values()), min(own, key=own.__getitem__)
    assert all(sizes[tensor] < 1e-5 * sizes[measures[tensor]] for tensor in sizes.keys() - own.keys())
