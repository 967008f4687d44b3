"""Seconds and bytes of every part of a model for every micro-batch, on one rank of a layout.

Matrix products run at a share of the peak, attention kernels at another, all else at the memory's bandwidth; every
kernel costs its launch. Collectives of tensor and context parallelism come on top, but for the ring, which runs beside
attention. Nothing here knows of stages: `step.py` adds the parts up, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tetrascope.engine import flops
from tetrascope.engine.predict import activations
from tetrascope.engine.predict.hardware import Hardware
from tetrascope.engine.predict.memory import Sizes
from tetrascope.engine.predict.model import MicroBatchShape, Model
from tetrascope.engine.recompute import Recompute
from tetrascope.models.media import Media
from tetrascope.parallel.mesh import Layout

FP32 = 4

ATTENTION_BACKWARD = 1.25
"""A flash kernel's backward computes five products where the forward has two, counted as four (arXiv 2307.08691 §3.1):
the scores once more."""

NORM_PASSES = 7
"""Reads and writes of an RMSNorm's rows, in fp32: x·x (2), mean (1), x·r (2), ·weight (2)."""

ROTATION_PASSES = 10
"""Those of a rotation, in fp32: negated half (1), concatenation (2), two products (4), sum (3)."""

ELEMENTWISE_BACKWARD = 2.0
"""Reads and writes of the backward of all that is not a matrix product, in terms of the forward's."""

LAYER_KERNELS, BLOCK_KERNELS = 33, 22
"""Kernels of a decoder layer's and an encoder block's forward: four linears, attention, two norms, rotations, MLP."""

KERNELS_BACKWARD = 1.5
"""Kernels of a backward but for the weights' gradients, in terms of the forward's."""


class Cost(NamedTuple):
    """Seconds and bytes of a part for a micro-batch. forward, backward_input, backward_weight: computing; recompute:
    all that the forward takes, in the backward once more; tensor, context: waiting for their collectives. kept, rest:
    see `activations.Kept`."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    recompute: float = 0.0
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0
    context_forward: float = 0.0
    context_backward: float = 0.0
    kept: float = 0.0
    rest: float = 0.0


LayerKind = tuple[bool, bool]
"""Whether a decoder layer is trained, and whether anything before it is."""

Kind = str | LayerKind
"""`vision` (with adaptor), `embed`, `head` (with loss), or a kind of decoder layers."""


@dataclass(frozen=True)
class Parts:
    """Costs of `kinds` for every micro-batch, `[kinds, micro-batches, fields of Cost]`.

    By micro-batch: border: bytes of hidden states between stages; features: bytes of the visual tokens;
    layer_workspace, head_workspace: see `activations`.
    """

    kinds: tuple[Kind, ...]
    costs: np.ndarray
    border: tuple[float, ...]
    features: tuple[float, ...]
    layer_workspace: tuple[float, ...]
    head_workspace: tuple[float, ...]


def parts(
    model: Model, layout: Layout, recompute: Recompute, micro_batches: Sequence[MicroBatchShape], hardware: Hardware
) -> Parts:
    """The parts' costs in a layout; they do not depend on how the model is cut."""
    rank = _Rank(model, layout, recompute, hardware)
    known: dict[MicroBatchShape, _MicroBatch] = {}
    for micro in micro_batches:
        if micro not in known:
            known[micro] = rank.micro_batch(micro)
    made = [known[micro] for micro in micro_batches]
    kinds: tuple[Kind, ...] = ("vision", "embed", "head", *rank.layer_kinds)
    return Parts(
        kinds=kinds,
        costs=np.array([[one.costs[kind] for one in made] for kind in kinds]),
        border=tuple(one.border for one in made),
        features=tuple(one.features for one in made),
        layer_workspace=tuple(one.layer_workspace for one in made),
        head_workspace=tuple(one.head_workspace for one in made),
    )


@dataclass(frozen=True)
class _MicroBatch:
    costs: dict[Kind, Cost]
    border: float
    features: float
    layer_workspace: float
    head_workspace: float


class _Rank:
    """One rank of a layout: how much of a part it does, and how fast."""

    def __init__(self, model: Model, layout: Layout, recompute: Recompute, hardware: Hardware) -> None:
        self.model, self.recompute, self.hardware = model, recompute == "full", hardware
        self.config, self.e = model.config, model.item
        self.tp, self.ring, self.ulysses = layout.tp, layout.ring, layout.ulysses
        self.cp = layout.ring * layout.ulysses
        self.tensor_link = hardware.link(layout.tp)
        self.ulysses_link = hardware.link(layout.tp * layout.ulysses)
        self.ring_link = hardware.link(layout.tp * self.cp)
        peak = hardware.peak(model.dtype)
        self.matmul_rate, self.attention_rate = peak * hardware.matmul_share, peak * hardware.attention_share
        sizes = model.sizes(layout.tp)
        self.accumulation = {part: self._accumulated(sizes, part) for part in sizes.parts}
        self.layer_kinds = tuple(dict.fromkeys(model.layer_kind(i) for i in range(self.config.decoder.layers)))
        self.encoder = model.encoder

    def micro_batch(self, micro: MicroBatchShape) -> _MicroBatch:
        d, rows = self.config.decoder, micro.rows / self.cp
        costs: dict[Kind, Cost] = {kind: self._layer(micro, *kind) for kind in self.layer_kinds}
        costs["vision"] = self._vision(micro.media)
        costs["embed"] = self._embedding(rows)
        costs["head"] = self._head(micro.rows)
        hidden = d.hidden * self.e
        full = activations.decoder_layer(d, self._lengths(micro), self.tp, self.e).whole if self.recompute else 0.0
        return _MicroBatch(
            costs=costs,
            border=rows / self.tp * hidden,
            features=sum(one.tokens for one in micro.media) / (self.cp * self.tp) * hidden,
            layer_workspace=full + activations.layer_workspace(d, rows, self.tp, self.e),
            head_workspace=activations.head_workspace(d, rows, self.tp, self.e),
        )

    def _layer(self, micro: MicroBatchShape, trained: bool, below: bool) -> Cost:
        d, rows = self.config.decoder, micro.rows / self.cp
        q, k, _ = (n / self.tp for n in d.qkv_rows)
        work = flops.layer_work(self.config, micro.packed, trained, below)
        moved = rows / self.tp * d.hidden * (2 * NORM_PASSES * FP32 + 6 * self.e) + rows * (
            ROTATION_PASSES * FP32 * (q + k)
            + (4 * q * self.e if k < q else 0)
            + 5 * d.intermediate / self.tp * self.e
            + (NORM_PASSES * FP32 * (q + k) if d.qk_norm else 0)
        )
        collective = 4 * self.tensor_link.gather(rows * d.hidden * self.e, self.tp)
        attention = work.forward.attention / (self.tp * self.cp) / self.attention_rate
        ways = self._context(micro.rows, attention)
        part = f"layers.{next(i for i in range(d.layers) if self.model.layer_kind(i) == (trained, below))}"
        cost = self._timed(work, moved, LAYER_KERNELS, self.accumulation[part], (collective, *ways))
        kept = activations.decoder_layer(d, self._lengths(micro), self.tp, self.e, trained)
        return self._with_bytes(cost, kept, rows / self.tp * d.hidden * self.e, trained or below)

    def _vision(self, media: Sequence[Media]) -> Cost:
        if not media:
            return Cost()
        shape, vision_cost, learning = self.encoder, self.config.vision_cost, self.model.trained
        rows = sum(one.patches for one in media) / self.cp
        features = sum(one.features for one in media) / self.cp
        width, own = shape.width, rows / self.tp
        block = own * width * ((2 * NORM_PASSES * FP32 if shape.rms else 4 * self.e) + 6 * self.e) + own * (
            (2 * width * ROTATION_PASSES * FP32 if shape.rotary else 0)
            + (5 if shape.gated else 2 * shape.copies) * shape.mlp * self.e
            + (4 * width * self.e if shape.scaled else 0)
        )
        blocks = shape.blocks
        gathered = self.tensor_link.gather(rows * width * self.e, self.tp)
        summed = self.tensor_link.reduce(features * self.config.decoder.hidden * self.e, self.tp)
        accumulated = self.accumulation["vision"] * learning.vision + self.accumulation["adaptor"] * learning.adaptor
        work = flops.vision_work(self.config, media, learning)
        collective = (4 * blocks + 1) * gathered + summed
        cost = self._timed(work, blocks * block, blocks * BLOCK_KERNELS, accumulated, (collective, 0.0, 0.0))
        if not (learning.vision or learning.adaptor):
            return cost._replace(backward_input=0.0, backward_weight=0.0, tensor_backward=0.0)
        adaptor = activations.adaptor(shape, features, self.tp, self.e)
        if not learning.vision:
            return cost._replace(tensor_backward=summed, kept=adaptor.whole, rest=adaptor.rest)
        windowed = vision_cost.window_attention / (vision_cost.attention + vision_cost.window_attention)
        encoder = activations.encoder(shape, media, windowed, self.tp, self.e)
        kept = activations.Kept(encoder.whole / self.cp, encoder.rest / self.cp)
        inputs = own * (blocks * width + shape.patch) * self.e  # of every block, and of the patch embedding
        cost = self._with_bytes(cost, kept, inputs, True)
        return cost._replace(kept=cost.kept + adaptor.whole, rest=cost.rest + adaptor.rest)

    def _embedding(self, rows: float) -> Cost:
        hidden = rows * self.config.decoder.hidden * self.e
        collective = self.tensor_link.gather(hidden, self.tp)
        learned = "embed" in self.model.learning
        moved = self._moved(3 * hidden, 3)
        return Cost(
            forward=moved,
            backward_input=moved if learned else 0.0,
            # The gradient of the table is dense, rows that no token names included.
            backward_weight=self.accumulation["embed"] if learned else 0.0,
            tensor_forward=collective,
            tensor_backward=collective if learned else 0.0,
        )

    def _head(self, all_rows: int) -> Cost:
        rows = all_rows / self.cp
        d, learned = self.config.decoder, "head" in self.model.learning
        below = self.model.below_head
        work = flops.head_work(self.config, all_rows, learned, below)
        # Copy in fp32, largest, difference, exponential, sum, quotient.
        logits = rows * d.vocab / self.tp * (self.e + 9 * FP32)
        moved = logits + rows / self.tp * d.hidden * NORM_PASSES * FP32
        collective = self.tensor_link.gather(rows * d.hidden * self.e, self.tp)
        losses = 2 * self.tensor_link.reduce(rows * FP32, self.tp)
        accumulated = self.accumulation["head"] + self.accumulation["norm"]
        cost = self._timed(work, moved, 20, accumulated, (collective + losses, 0.0, 0.0))
        kept = activations.head(d, rows, self.tp, self.e, learned)
        return cost._replace(kept=kept.whole, rest=kept.rest) if below or learned else cost

    def _timed(
        self, work: flops.Work, moved: float, kernels: int, accumulated: float, ways: tuple[float, float, float]
    ) -> Cost:
        """Seconds of some work of the whole micro-batch, of which this rank does its part; moved: bytes that its
        elementwise forward reads and writes; ways: its collectives: tensor parallel (either way), and context parallel
        forward and backward."""
        share = 1 / (self.tp * self.cp)

        def products(of: flops.Products, slower: float = 1.0) -> float:
            return share * (of.linears / self.matmul_rate + of.attention * slower / self.attention_rate)

        through, learned = sum(work.backward_input) > 0, sum(work.backward_weight) > 0
        elementwise = self._moved(moved, kernels)
        backward = self._moved(moved * ELEMENTWISE_BACKWARD, kernels * KERNELS_BACKWARD)
        tensor, context_forward, context_backward = ways
        return Cost(
            forward=products(work.forward) + elementwise,
            backward_input=products(work.backward_input, ATTENTION_BACKWARD) + (backward if through or learned else 0),
            backward_weight=products(work.backward_weight) + (accumulated if learned else 0),
            tensor_forward=tensor,
            tensor_backward=tensor if through or learned else 0.0,
            context_forward=context_forward,
            context_backward=context_backward if through else 0.0,
        )

    def _with_bytes(self, cost: Cost, kept: activations.Kept, inputs: float, backward: bool) -> Cost:
        """Adds what is kept; under recomputation that is the layers' inputs, and the forward runs once more."""
        if not backward:
            return cost
        if not self.recompute:
            return cost._replace(kept=kept.whole, rest=kept.rest)
        again = cost.forward + cost.tensor_forward + cost.context_forward
        return cost._replace(kept=inputs, rest=kept.rest, recompute=again)

    def _context(self, rows: int, attention: float) -> tuple[float, float]:
        """Seconds of context parallelism in forward and backward; attention: of the forward's kernel, beside which the
        ring runs.

        Elements per rank and layer (arXiv 2405.07719; P ranks, L rows, widths d and d_kv of queries and keys):
        Ulysses (P − 1)/P · L/P · (2d + 2d_kv) each way; ring (P − 1) · L/P · 2d_kv forward, the same again backward
        and P · L/P · 2d_kv in fp32 for the gradients of keys and values.
        """
        d, u, r = self.config.decoder, self.ulysses, self.ring
        query = d.qkv_rows[0] / self.tp
        # Key and value heads are repeated where there are fewer than Ulysses ranks.
        key = max(d.kv_heads / self.tp, u) * d.head_dim if u > 1 else d.qkv_rows[1] / self.tp
        forward = backward = 0.0
        if u > 1:
            size = (u - 1) / u * rows / self.cp * (2 * query + 2 * key) * self.e
            forward = backward = 4 * self.ulysses_link.latency + size / self.ulysses_link.bandwidth
        if r > 1:
            block = rows / r * 2 * key / u
            link = self.ring_link
            once = (r - 1) * link.point_to_point(block * self.e)
            back = once + r * link.point_to_point(block * FP32)
            forward += max(0.0, once - attention)
            backward += max(0.0, back - 2 * ATTENTION_BACKWARD * attention)
        return forward, backward

    def _moved(self, size: float, kernels: float) -> float:
        """Seconds of kernels that read and write so many bytes."""
        return size / self.hardware.memory_bandwidth + kernels * self.hardware.kernel_seconds

    def _accumulated(self, sizes: Sizes, part: str) -> float:
        """Seconds in which a part's gradients are added to the fp32 ones: read, read, written."""
        return sizes.trained(part) * (self.e + 2 * FP32) / self.hardware.memory_bandwidth

    def _lengths(self, micro: MicroBatchShape) -> tuple[float, ...]:
        """Documents as this rank has them: context parallelism takes its share of each."""
        return tuple(n / self.cp for n in micro.packed)


def fields(table: np.ndarray, *names: str) -> Any:
    """The sum of some fields of costs, over the last axis."""
    return sum(table[..., Cost._fields.index(name)] for name in names)
