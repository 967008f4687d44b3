"""What the ranks of `python -m tetrascope.tools.bench.context_bytes` run: bytes counted where tensors enter torch's
collectives, so that what a rank believes to send plays no part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.parallel.context.attention import (
    AttentionPlan,
    ContextAttention,
    Exchange,
    links,
    pick_block_kernel,
)
from tetrascope.parallel.context.exchange import exchange_features
from tetrascope.parallel.context.tokens import TokenSharding, shard_tokens
from tetrascope.parallel.context.visual import FeatureRoute, VisualSharding, route_features, shard_visual, visual_places
from tetrascope.parallel.mesh import Layout, Mesh


@dataclass(frozen=True)
class Mode:
    """A way of context-parallel attention."""

    ring: int
    ulysses: int
    exchange: Exchange = "ring"

    @property
    def ranks(self) -> int:
        return self.ring * self.ulysses


@dataclass(frozen=True)
class Layer:
    """One attention layer. documents: their rows. dtype: a name, such as "bfloat16"."""

    documents: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    dtype: str

    @property
    def rows(self) -> int:
        return sum(self.documents)


@dataclass(frozen=True)
class Pictures:
    """The visual part of a micro-batch: frames of `tokens` features each, one visual token a feature, that begin at row
    `first` of the layer's pack. width: of a feature."""

    frames: int
    tokens: int
    first: int
    width: int


@dataclass
class Counted:
    """Bytes that a rank has given to collectives for other ranks."""

    bytes: int = 0


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts what leaves this rank: all but its own share of an all-to-all, size - 1 times its part in a gather or a
    reduce-scatter, which the usual algorithms pass on that often."""
    counted = Counted()
    originals = dist.batch_isend_irecv, dist.all_to_all_single, links.all_gather, links.reduce_scatter

    def point_to_point(operations: list[dist.P2POp]) -> Any:
        counted.bytes += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return originals[0](operations)

    def all_to_all(
        out: Tensor, own: Tensor, to: list[int] | None = None, of: list[int] | None = None, **options: Any
    ) -> Any:
        size, rank = options["group"].size(), options["group"].rank()
        stays = of[rank] if of is not None else len(own) // size
        counted.bytes += (len(own) - stays) * own[:1].nbytes
        return originals[1](out, own, to, of, **options)

    def all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup, **options: Any) -> Any:
        counted.bytes += own.nbytes * (group.size() - 1)
        return originals[2](out, own, group, **options)

    def reduce_scatter(out: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        counted.bytes += whole.nbytes // group.size() * (group.size() - 1)
        originals[3](out, whole, group)

    with (
        mock.patch.object(dist, "batch_isend_irecv", point_to_point),
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(links, "all_gather", all_gather),
        mock.patch.object(links, "reduce_scatter", reduce_scatter),
    ):
        yield counted


@dataclass
class _Shared:
    context: AttentionPlan


def attention_bytes(layer: Layer, modes: list[Mode]) -> list[tuple[int, int]]:
    """Bytes that this rank sends in the forward and in the backward of the layer, in every mode. All documents are
    cut."""
    found = []
    for mode in modes:
        mesh = Mesh(Layout(ring=mode.ring, ulysses=mode.ulysses), "cpu")
        dtype = getattr(torch, layer.dtype)
        _, kernel = pick_block_kernel("auto", torch.device("cpu"), dtype)
        attend = ContextAttention(mesh.group("ring"), mesh.group("ulysses"), sdpa_attention, kernel, mode.exchange)
        sharding = shard_tokens(layer.documents, mode.ring, mode.ulysses, chunk=0)
        packed = _Shared(AttentionPlan(sharding, mesh.index("ring")))
        q, k, v = (
            torch.randn(sharding.rank_rows, heads, layer.width, dtype=dtype, requires_grad=True)
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        )
        with counting() as forward:
            out = attend(q, k, v, packed, True)
        with counting() as backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        found.append((forward.bytes, backward.bytes))
    return found


def divide_pictures(
    layer: Layer, pictures: Pictures, mode: Mode
) -> tuple[TokenSharding, VisualSharding, tuple[FeatureRoute, ...]]:
    """Where tokens lie, who encodes what, and what is exchanged."""
    sharding = shard_tokens(layer.documents, mode.ring, mode.ulysses, chunk=0)
    features = [pictures.tokens] * pictures.frames
    visual = shard_visual([4 * n for n in features], features, features, mode.ranks)
    rows = pictures.first + np.arange(sum(features))
    places = visual_places(rows, sharding)
    return sharding, visual, route_features(visual, np.arange(sum(features))[None], [tokens for tokens, _ in places])


def picture_bytes(layer: Layer, pictures: Pictures, modes: list[Mode]) -> list[tuple[int, int]]:
    """Bytes of features that this rank sends to the owners of their tokens, and of gradients that it sends back."""
    found = []
    for mode in modes:
        mesh = Mesh(Layout(ring=mode.ring, ulysses=mode.ulysses), "cpu")
        _, visual, routes = divide_pictures(layer, pictures, mode)
        route = routes[dist.get_rank()]
        shape = len(visual.features_of(route.rank)), pictures.width
        own = torch.randn(shape, dtype=getattr(torch, layer.dtype), requires_grad=True)
        with counting() as forward:
            (received,) = exchange_features(
                [own], torch.from_numpy(route.send_rows), route.send_counts, route.receive_counts, mesh.context
            )
        with counting() as backward:
            received.sum().backward()
        found.append((forward.bytes, backward.bytes))
    return found
