"""What the ranks of the exchange tests do, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tetrascope.parallel.context.exchange import exchange_features
from tetrascope.parallel.context.tokens import TokenSharding, shard_tokens
from tetrascope.parallel.context.visual import FeatureRoute, VisualSharding, route_features, shard_visual, visual_places

ROWS_IN, WIDTH, MERGED, LAYERS = 6, 5, 4, 3  # width of encoder rows and of features; rows of a feature; feature tensors


@dataclass(frozen=True)
class Case:
    """A micro-batch: frames in features each, which go to visual tokens in order; tokens of each document, visual ones
    at `visual_rows`; 'several': a token is made of several features and some of the newline."""

    frames: tuple[int, ...]
    documents: tuple[int, ...]
    first_visual: int
    several: bool

    @property
    def features(self) -> int:
        return sum(self.frames)

    @property
    def visual_rows(self) -> np.ndarray:
        return self.first_visual + np.arange(self.features)

    def layout(self) -> tuple[np.ndarray, np.ndarray]:
        """picks int64 and weights float32 `[C, V]`."""
        generator = np.random.default_rng(5)
        if not self.several:
            return np.arange(self.features)[None], np.ones((1, self.features), dtype=np.float32)
        size = (3, self.features)
        return generator.integers(self.features + 1, size=size), generator.standard_normal(size, dtype=np.float32)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Encoder rows, weights of the encoder (one for each feature tensor), newline, weights of the loss."""
        generator = torch.Generator().manual_seed(3)
        rows = torch.randn(self.features * MERGED, ROWS_IN, generator=generator, dtype=torch.float64)
        weights = [torch.randn(ROWS_IN, WIDTH, generator=generator, dtype=torch.float64) for _ in range(LAYERS)]
        newline = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        loss = torch.randn(LAYERS, sum(self.documents), WIDTH, generator=generator, dtype=torch.float64)
        return rows.to(dtype), [w.to(dtype) for w in weights], newline.to(dtype), loss.to(dtype)


def encode(rows_NE: Tensor, frames: Sequence[int], weight_EH: Tensor) -> Tensor:
    """Features `[F, H]`. A row sees the mean of its frame, so that a frame that was cut would give others."""
    mixed = [torch.tanh(rows * 1.5 + rows.mean(0)) for rows in rows_NE.split([MERGED * n for n in frames])]
    if not mixed:
        return rows_NE.new_zeros(0, weight_EH.shape[1])
    return (torch.cat(mixed) @ weight_EH).unflatten(0, (-1, MERGED)).sum(1)


def loss_of(tokens: Sequence[Tensor], rows_M: Tensor, weights_LTH: Tensor, total: int) -> Tensor:
    """Σ weight · hidden², hidden having the visual tokens in their rows; empty tokens take part too."""
    loss = weights_LTH.new_zeros(())
    for tokens_MH, weights_TH in zip(tokens, weights_LTH, strict=True):
        hidden_TH = tokens_MH.new_zeros(total, WIDTH).index_copy(0, rows_M, tokens_MH)
        loss = loss + (weights_TH * hidden_TH**2).sum()
    return loss


def combine(features_FH: Tensor, newline_H: Tensor, picks: np.ndarray, weights: np.ndarray) -> Tensor:
    chosen = torch.cat((features_FH, newline_H[None]))[torch.from_numpy(picks)]
    return (chosen * torch.from_numpy(weights).to(chosen.dtype)[:, :, None]).sum(0)


def plan(case: Case, ring: int, ulysses: int) -> tuple[TokenSharding, VisualSharding, tuple, tuple[FeatureRoute, ...]]:
    sharding = shard_tokens(case.documents, ring, ulysses, chunk=1)
    visual = shard_visual([MERGED * n for n in case.frames], case.frames, case.frames, ring * ulysses)
    places = visual_places(case.visual_rows, sharding)
    return sharding, visual, places, route_features(visual, case.layout()[0], [numbers for numbers, _ in places])


def whole(case: Case, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """The oracle, in one process: loss, gradients of the encoder's weights, gradient of the newline."""
    rows, weights, newline, loss_weights = case.tensors(dtype)
    for leaf in (*weights, newline):
        leaf.requires_grad_()
    picks, factors = case.layout()
    tokens = [combine(encode(rows, case.frames, weight), newline, picks, factors) for weight in weights]
    loss = loss_of(tokens, torch.from_numpy(case.visual_rows), loss_weights, sum(case.documents))
    loss.backward()
    return loss.detach(), [weight.grad for weight in weights], newline.grad


def divided(
    case: Case, ring: int, ulysses: int, dtype: torch.dtype, trained: bool = True
) -> tuple[Tensor, list[Tensor], Tensor, list[int], FeatureRoute]:
    """The same over all ranks: this rank's part of each, bytes sent to others in every collective, and its route."""
    sharding, visual, places, routes = plan(case, ring, ulysses)
    rank = dist.get_rank()
    rows, weights, newline, loss_weights = case.tensors(dtype)
    for leaf in (*weights, newline) if trained else (newline,):
        leaf.requires_grad_()
    sent: list[int] = []
    original = dist.all_to_all_single

    def counted(out: Tensor, own: Tensor, to: list[int], of: list[int], **kwargs: object) -> object:
        sent.append((sum(of) - of[rank]) * own.shape[1] * own.element_size())
        assert len(own) == sum(of) and len(out) == sum(to)
        return original(out, own, to, of, **kwargs)

    route = routes[rank]
    frames = [n // MERGED for n in visual.frames(rank)]
    with mock.patch.object(dist, "all_to_all_single", counted):
        # A rank that has no image calls no encoder: its features are plain empty tensors.
        own = [
            encode(rows[torch.from_numpy(visual.rows_of(rank))], frames, weight) if frames else rows.new_zeros(0, WIDTH)
            for weight in weights
        ]
        padded = [torch.cat((one, one.new_full((2, WIDTH), float("nan")))) for one in own]  # rows nobody asks for
        received = exchange_features(
            padded,
            torch.from_numpy(route.send_rows),
            route.send_counts,
            route.receive_counts,
            dist.group.WORLD,
            trained,
        )
        numbers, places_M = places[rank]
        factors = case.layout()[1][:, numbers]
        tokens = [combine(one, newline, route.picks_CM, factors) for one in received]
        mine = torch.from_numpy(np.minimum(sharding.rows_of(rank), sum(case.documents) - 1))
        loss = loss_of(tokens, torch.from_numpy(places_M), loss_weights[:, mine], sharding.rank_rows)
        loss.backward()
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    newline_grad = torch.zeros_like(newline) if newline.grad is None else newline.grad
    return loss.detach(), grads, newline_grad, sent, route
