"""Bytes of live tensors, counted: the same on every run and every machine, unlike what a process takes of the system.

Every tensor that an operator gives out in memory of its own counts until its storage is freed. What kernels and
transfers take for themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, `live` is the bytes of tensors made inside it that are still there, `peak` the most so far.

    Tensors made before do not count, nor do views of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _address(x) not in given | self._seen:
                self._add(x)
        return out

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address, size = _address(x), storage.nbytes()
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def _address(x: Tensor) -> int:
    """Tells storages that exist at the same time apart."""
    return x.untyped_storage()._cdata
