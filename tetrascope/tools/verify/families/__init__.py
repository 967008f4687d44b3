"""Oracles by family name: each module has `variants()`, its cases by name, and `reference(case, batches)`."""

from __future__ import annotations

import importlib
from typing import Any

from tetrascope.errors import UserError

ORACLES = {
    "qwen2_vl": "tetrascope.tools.verify.families.qwen2_vl",
    "qwen2_5_vl": "tetrascope.tools.verify.families.qwen2_5_vl",
    "qwen3_vl": "tetrascope.tools.verify.families.qwen3_vl",
    "llava": "tetrascope.tools.verify.families.llava",
    "llava_onevision": "tetrascope.tools.verify.families.llava_onevision",
    "internvl": "tetrascope.tools.verify.families.internvl",
    "longvila": "tetrascope.tools.verify.families.longvila",
}


def get_oracle(family: str) -> Any:
    """The oracle module of a family. Raises UserError when there is none."""
    if family not in ORACLES:
        raise UserError(f"verify: no oracle for family {family!r}; there is one for: {', '.join(sorted(ORACLES))}")
    return importlib.import_module(ORACLES[family])
