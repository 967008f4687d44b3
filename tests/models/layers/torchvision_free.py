"""Functions of transformers' video processors, whose modules cannot be imported without torchvision.

Each is compiled by itself out of the installed source file, so that the oracle is the code that users run.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch


def oracle(module: str, function: str) -> Callable[..., Any]:
    """Function or method `function` of `transformers.models.<module>`, without decorators and annotations."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "models" / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    found.decorator_list, found.returns = [], None
    for argument in [*found.args.args, *found.args.kwonlyargs, found.args.kwarg]:
        if argument is not None:
            argument.annotation = None
    names: dict[str, Any] = {"math": math, "np": np, "torch": torch}
    exec(compile(ast.Module([found], type_ignores=[]), str(path), "exec"), names)
    return names[function]
