"""Packaging of tetrascope: what it needs, and the `tetrascope` command. Exact versions: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Plain lists of strings: tests/test_layout.py reads them without running this file.
INSTALL_REQUIRES = [
    "torch>=2.11,<2.14",
    "transformers>=5.17,<6",
    "tokenizers",
    "safetensors",
    "pillow",
    "av>=17",
    "numpy",
    "pydantic>=2",
    "typer",
    "rich",
    "pyyaml",
    "tensorboard",
    "fsspec",
    "pyarrow",
    "tenacity",
]
MEGATRON_REQUIRES = [
    "megatron-core>=0.16",
]
DEMO_REQUIRES = [
    "scikit-learn",
]
DEV_REQUIRES = [
    "pytest",
    "ruff",
    "mypy",
    "import-linter",
    "types-PyYAML",
    "hypothesis",
]


def read_version() -> str:
    """Return `__version__` of the package without importing it: torch need not be installed yet."""
    text = (ROOT / "tetrascope" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('tetrascope/__init__.py: expected a line like __version__ = "1.2.3"')
    return match.group(1)


setup(
    name="tetrascope",
    version=read_version(),
    description="A 4D-parallel (TP, PP, DP with ZeRO-1, CP) training engine for vision-language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="tetrascope developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["tetrascope", "tetrascope.*"]),
    package_data={"tetrascope": ["py.typed"], "tetrascope.engine.predict": ["hardware.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "demo": DEMO_REQUIRES,
        "megatron": MEGATRON_REQUIRES,
        "dali": ["nvidia-dali-cuda130"],  # not locked: it comes with CUDA libraries, as torch does
        "dev": DEV_REQUIRES + DEMO_REQUIRES + MEGATRON_REQUIRES,
    },
    entry_points={"console_scripts": ["tetrascope = tetrascope.cli:main"]},
    zip_safe=False,
)
