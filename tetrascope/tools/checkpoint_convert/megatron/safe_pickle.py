"""Reading pickled files of strangers without running anything in them.

A pickle names the functions and classes that unpickling calls. Here a file may name those of torch and of Python that
only hold data; what a Megatron checkpoint usually holds besides (enumerations, NumPy's random state, paths) becomes an
inert `Opaque`, without the module that defines it being imported; anything else is refused before it is loaded.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from tetrascope.errors import UserError


class Opaque:
    """Stands for an object whose class is not loaded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Unpickling gives the object its contents, which nobody needs."""

    def __repr__(self) -> str:
        return f"Opaque{self.args}"


_INERT = re.compile(
    r"megatron\.[\w.]+|transformer_engine\.[\w.]+"
    r"|numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|ndarray|dtype|dtypes\.\w+|random\.[\w.]+)"
    r"|pathlib\.\w+|signal\.Signals|_io\.BytesIO|io\.BytesIO|enum\.\w+|torch\._C\.Generator"
)
"""Names for which an Opaque is put. None of them is imported."""

_DATA: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
}
"""Names that are what they say: classes that hold data and do nothing."""

_DCP = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (
            metadata,
            (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            ),
        ),
        (filesystem, ("_StorageInfo", "_StoragePrefix")),
    )
    for name in names
}


class _DataUnpickler(pickle.Unpickler):
    """Knows the classes of torch.distributed.checkpoint's list of contents."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known = _DATA | _DCP
        if full in known:
            return known[full]
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        if _INERT.fullmatch(full) or module == "torch.distributed.checkpoint.planner":
            return Opaque
        raise pickle.UnpicklingError(f"foreign {full}")


def load_contents(path: Path) -> metadata.Metadata:
    """The `.metadata` of a torch.distributed.checkpoint folder.

    Raises UserError when it cannot be read, is something else, or names functions or classes that it should not.
    """
    try:
        with path.open("rb") as file:
            found = _DataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(_refused(path, str(error)) if "foreign" in str(error) else _unreadable(path, error)) from error
    except (OSError, EOFError, ValueError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise UserError(_unreadable(path, error)) from error
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{path}: holds no list of a checkpoint's contents; give a torch_dist checkpoint folder")
    return found


@contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Lets torch load these beside what it always does, and nothing that other libraries, as Megatron-Core when it is
    imported, have allowed for the whole process."""
    before = get_safe_globals()
    clear_safe_globals()
    try:
        with safe_globals(allowed):
            yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def load_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, its tensors mapped and not read, on the CPU.

    Raises UserError when it cannot be read, or names functions or classes other than those above.
    """
    try:
        with _only([]):
            foreign = get_unsafe_globals_in_checkpoint(str(path))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(_unreadable(path, error)) from error
    refused = [name for name in foreign if name not in _DATA and not _INERT.fullmatch(name)]
    if refused:
        raise UserError(_refused(path, ", ".join(sorted(refused))))
    allowed: list[Any] = [(_DATA.get(name, Opaque), name) for name in foreign]
    try:
        with _only([*allowed, Opaque]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(_unreadable(path, error)) from error


def _refused(path: Path, what: str) -> str:
    return (
        f"{path}: refused, since it asks for code to be run on loading ({what.removeprefix('foreign ')}); nothing was "
        "run. If you trust where it comes from, load it there and save its model tensors and args alone"
    )


def _unreadable(path: Path, error: Exception) -> str:
    cause = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return f"{path}: cannot be read ({cause}); copy it again"
