"""The rules about the tree itself that neither ruff, mypy nor the import contracts can state.

Two groups: models are plain PyTorch (no `torch.distributed`, which an import contract cannot forbid: it is a
submodule of an external package), and the packaging is consistent (setup.py, constraints.txt, folders).
"""

from __future__ import annotations

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tetrascope"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# Pinned exactly by the torch wheels that use them, so the lock leaves them out.
PINNED_BY_TORCH = ("nvidia-", "triton", "cuda-toolkit")


def distributed_uses(source: str) -> list[int]:
    """Line numbers in `source` that import `torch.distributed` or reach it as an attribute of torch."""
    tree = ast.parse(source)
    torch_names = {"torch"}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torch_names.update(alias.asname for alias in node.names if alias.name == "torch" and alias.asname)
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        if any(target.split(".")[:2] == ["torch", "distributed"] for target in targets):
            lines.append(node.lineno)
    lines += [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id in torch_names
    ]
    return sorted(set(lines))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "import math, torch.distributed.tensor",
        "from torch import distributed",
        "from torch import nn, distributed as dist",
        "from torch.distributed import all_reduce",
        "from torch.distributed.device_mesh import DeviceMesh",
        "def forward():\n    import torch.distributed as dist",
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch as t\nt.distributed.barrier()",
    ],
)
def test_every_way_to_reach_torch_distributed_is_seen(source: str) -> None:
    assert distributed_uses(source) == [source.count("\n") + 1]


def test_harmless_imports_are_not_reported() -> None:
    source = "import torch\nfrom torch import nn\nfrom .distributed import x\nplan.distributed = x"
    assert distributed_uses(source) == []


def test_models_do_not_touch_torch_distributed() -> None:
    files = sorted((PACKAGE / "models").rglob("*.py"))
    assert files, "no model files found: has tetrascope/models moved?"
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in distributed_uses(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"models are plain PyTorch, parallelism is attached from outside; remove: {found}"


def test_every_source_folder_is_a_package() -> None:
    # setuptools finds packages by __init__.py: without one, a folder is missing from a built wheel.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"these folders lack an __init__.py: {sorted(missing)}"


def setup_requirements() -> list[Requirement]:
    """All requirements that setup.py declares, the extras included, read from its literal lists."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.endswith("_REQUIRES")
    }
    assert set(lists) == {"INSTALL_REQUIRES", "DEMO_REQUIRES", "DEV_REQUIRES", "MEGATRON_REQUIRES"}
    return [Requirement(line) for lines in lists.values() for line in lines]


def lock_pins(python_version: str) -> dict[str, str]:
    """Package name -> the one version that constraints.txt pins for `python_version` ("3.11")."""
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"python_version": python_version}):
            continue
        name = canonicalize_name(requirement.name)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, f"not an exact pin: {line}"
        assert name not in pins, f"{name} is pinned twice for Python {python_version}"
        pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("python_version", PYTHONS)
def test_lock_meets_setup(python_version: str) -> None:
    pins = lock_pins(python_version)
    for requirement in setup_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"setup.py needs {name}, which constraints.txt does not pin"
        assert requirement.specifier.contains(pins[name]), (
            f"setup.py asks for {requirement}, constraints.txt pins {pins[name]} for Python {python_version}"
        )


@pytest.mark.parametrize("python_version", PYTHONS)
def test_lock_leaves_cuda_libraries_to_torch(python_version: str) -> None:
    assert not [name for name in lock_pins(python_version) if name.startswith(PINNED_BY_TORCH)]


def test_lock_is_complete() -> None:
    """Everything that the declared requirements pull in, as installed here, has a pin for this Python."""
    pins = lock_pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    waiting = [(requirement, "setup.py") for requirement in setup_requirements()]
    seen: set[tuple[str, frozenset[str]]] = set()
    missing = []
    while waiting:
        requirement, parent = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name.startswith(PINNED_BY_TORCH):
            continue
        seen.add(key)
        if name not in pins:
            missing.append(f"{name} (for {parent})")
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # not installed here, so nothing below it is either
        for child in map(Requirement, lines):
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((child, name))
    assert not missing, f"not pinned in constraints.txt: {', '.join(sorted(missing))}"
