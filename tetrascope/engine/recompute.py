"""Recomputation of activations (arXiv 1604.06174): layers keep their input only and run again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "full"]
"""full: of every decoder layer and encoder block."""


Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


def recompute_layers(module: nn.Module, keep: Contexts | None = None) -> None:
    """Lets the decoder layers and encoder blocks inside a model keep nothing but their inputs.

    The layers themselves stay as they are, names of parameters too. Nothing in them is random, so that no state of
    a random generator has to be kept. keep: contexts for a layer's forward and for its repetition, between which it may
    keep what is dear to compute twice (`ContextAttention.keep_results`).
    """
    options: dict[str, Any] = {} if keep is None else {"context_fn": keep}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and name.rsplit(".", 1)[-1] in ("layers", "blocks"):
            for layer in child.values() if isinstance(child, nn.ModuleDict) else child:
                layer.forward = _again(layer.forward, **options)


def tile_mlps(module: nn.Module, rows: int, tp: int) -> None:
    """Lets the MLPs of the decoder layers inside a model run on `rows` rows at a time, each tile again in the backward.

    Activations of the intermediate width are then never whole (ALST, arXiv 2506.13996 §3.1). Under tensor parallelism a
    tile is `rows` / `tp` rows of every rank, at least one: all ranks have as many tiles, each with its own gather and
    scatter. Inside a layer that is itself recomputed, an MLP is computed three times instead of twice.
    """
    for name, child in module.named_modules():
        if name.startswith("layers.") and name.count(".") == 2 and name.endswith(".mlp"):
            child.forward = partial(_in_tiles, _again(child.forward), max(1, rows // tp))


def _again(forward: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **options)


def _in_tiles(forward: Callable[[Tensor], Tensor], rows: int, x_tH: Tensor) -> Tensor:
    """A function of single rows, `rows` of them at a time."""
    if len(x_tH) <= rows:
        return forward(x_tH)
    return torch.cat([forward(tile) for tile in x_tH.split(rows)])
