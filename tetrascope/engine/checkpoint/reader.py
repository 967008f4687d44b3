"""Reading the list of a checkpoint's contents without running what might be in it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta

from tetrascope.errors import UserError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "torch.storage": {"UntypedStorage"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "bytearray"},
}
"""Module -> names that the list of contents is made of; None: its classes."""


class _SafeUnpickler(pickle.Unpickler):
    """Makes nothing but what torch writes into `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        names = _ALLOWED.get(module, ())
        if (
            names is None
            or name in names
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        ):
            found = super().find_class(module, name)
            if names is not None or isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which has no place in a checkpoint")


class CheckpointReader(FileSystemReader):
    """torch's reader of checkpoint files; `.metadata` cannot run code, tensors are read with weights_only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises OSError, EOFError or pickle.UnpicklingError when the file is damaged or holds anything foreign."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                found = _SafeUnpickler(file).load()
            except (AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
                raise pickle.UnpicklingError(f"not a list of contents: {error!r}") from error
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"not a list of contents but a {type(found).__name__}")
        meta = getattr(found, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        found.storage_meta = meta
        return found


def saved_tensors(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, by name. Raises UserError when its list of contents is damaged."""
    try:
        return dict(CheckpointReader(checkpoint).read_metadata().state_dict_metadata)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(damaged(checkpoint, f".metadata: {error!r}")) from error


def damaged(checkpoint: Path, what: str) -> str:
    """The message for a checkpoint that cannot be read."""
    return f"{checkpoint}: damaged ({what}); remove it to go on from an older one"
