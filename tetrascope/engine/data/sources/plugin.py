"""Samples that the user's own class gives."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from tetrascope.engine.data.sources.base import BadSample, Record
from tetrascope.engine.data.sources.conversation import record
from tetrascope.engine.data.store import Store
from tetrascope.errors import UserError


class Plugin:
    """A class named `package.module:Class`, made as `Class(**options)`.

    It needs __len__ and __getitem__(number) that returns a dict: `messages` or `conversations` with `images` and
    `videos` as bytes or paths, or `tokens`, a list or array of token ids; and `id`, if it likes. Whatever
    __getitem__ raises makes that sample a bad one. It is made anew in every worker process, so that it may hold
    open files. Threads take turns with it, unless the class sets `thread_safe = True`. With a method stamp() -> str it
    says when its samples have changed; without one they count as changed when its options, its length or the file of
    its code do.

    Raises UserError when the class cannot be imported or made, or has no samples.
    """

    def __init__(self, path: str, store: Store, options: Mapping[str, Any]) -> None:
        self._path, self._store, self._options = path, store, dict(options)
        made = _imported(path)
        try:
            self._data = made(**self._options)
            self._length = len(self._data)
        except Exception as error:
            raise UserError(
                f"data: {path} cannot be made with the options {self._options}: {type(error).__name__}: {error}"
            ) from error
        if not self._length:
            raise UserError(f"data: {path} holds no samples")
        if not hasattr(self._data, "__getitem__"):
            raise UserError(f"data: {path} has no __getitem__; it gives the sample of a number as a dict")
        shared = getattr(self._data, "thread_safe", False)
        self._turn: AbstractContextManager[Any] = nullcontext() if shared else threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "store": self._store, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["store"], state["options"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self._length

    def record(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        name = f"sample {number}"
        try:
            with self._turn:
                row = self._data[number]
        except BadSample:
            raise
        except Exception as error:
            raise BadSample("other", f"{self._path}: {name}: {type(error).__name__}: {error}") from error
        try:
            if isinstance(row, Mapping) and row.get("tokens") is not None:
                return _tokens(row, name)
            return record(dict(row) if isinstance(row, Mapping) else row, name, self._store.resolve)
        except BadSample as error:
            raise BadSample(error.kind, f"{self._path}: {error}") from error

    def stamp(self) -> str:
        if hasattr(self._data, "stamp"):
            return str(self._data.stamp())
        try:
            code = self._store.stamp(inspect.getfile(type(self._data)))
        except (TypeError, OSError, UserError):  # written in C, or not in a file
            code = ""
        told = [self._path, self._options, self._length, code]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _imported(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not module or not colon or not name:
        raise UserError(f"data: {path} is not of the form package.module:Class")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise UserError(
            f"data: {path} cannot be imported ({type(error).__name__}: {error}); install its package, or put its "
            "folder on PYTHONPATH"
        ) from error
    return found


def _tokens(row: Mapping[str, Any], name: str) -> Record:
    """A row of tokens; what else it holds would be lost, so it may hold nothing else."""
    more = [key for key, value in row.items() if key not in ("tokens", "id") and value is not None]
    if more:
        raise BadSample("other", f"{name}: has tokens and {', '.join(map(str, more))}; expected one or the other")
    tokens = np.asarray(row["tokens"])
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise BadSample("other", f"{name}: tokens are {tokens.dtype} of shape {tokens.shape}; expected integers [T]")
    return Record(name if row.get("id") is None else str(row["id"]), None, (), tokens.astype(np.int64))
