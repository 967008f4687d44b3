"""What the ranks of `python -m tetrascope.tools.bench.long` run: one training step of a tiny model on a long sequence.

The engine's own parts, from the sharding of tokens and frames to the optimizer's step; only pixels are made up. All
rows of a video have the same, so that no rank ever holds more of them than those that it encodes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tetrascope.engine.attention import context_attention
from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.data.collate import SharedPack, collate
from tetrascope.engine.data.document import ContextPlace, Document
from tetrascope.engine.modules import family_modules
from tetrascope.engine.recompute import Recompute
from tetrascope.engine.source import random_source
from tetrascope.engine.step import forward_backward
from tetrascope.models.family import get_family
from tetrascope.models.layers.attention import pick_attention
from tetrascope.models.media import Media
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, Qwen2VLDecoder, Qwen2VLVision, media
from tetrascope.parallel.context.attention import ContextAttention
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.pipeline.generators import GENERATORS
from tetrascope.tools.bench.live_bytes import LiveBytes

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = range(6)


@dataclass(frozen=True)
class Content:
    """A document: a video of `frames` temporal patches of side x side patches, four to a token, and text after it."""

    frames: int
    side: int
    text: int

    @property
    def visual_tokens(self) -> int:
        return self.frames * self.side**2 // 4

    @property
    def tokens(self) -> int:
        """With the two tokens around the video, if there is one."""
        return self.visual_tokens + (2 if self.frames else 0) + self.text


@dataclass(frozen=True)
class Job:
    """A step. layers: of the decoder. width: hidden. heads: of queries, of width / heads numbers each; kv_heads: of
    keys. loss_rows, mlp_rows, recompute: as in `train`."""

    contents: tuple[Content, ...]
    ring: int
    ulysses: int
    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 1
    vocab: int = 512
    recompute: Recompute = "full"
    loss_rows: int | None = 256
    mlp_rows: int | None = 256

    @property
    def config(self) -> Qwen2VLConfig:
        """A tiny Qwen2-VL with patches of 2 x 2 pixels."""
        half = self.width // self.heads // 2
        return Qwen2VLConfig(
            decoder=Qwen2VLDecoder(self.width, 3 * self.width, self.layers, self.heads, self.kv_heads, self.vocab),
            vision=Qwen2VLVision(width=16, layers=1, heads=1, patch=2),
            mrope_section=(half - 2 * (half // 3), half // 3, half // 3),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )


@dataclass(frozen=True)
class RankMemory:
    """One rank's step. Bytes. state: parameters, gradients, optimizer. batch: its part of the micro-batch. peak: of
    other tensors alive at a time. resident: most that the process took of the system (VmHWM), before: at the start of
    the job. sent: by attention, by kind of transfer. balance: attention work of the busiest ring rank over the mean.
    rows: of tokens; patches: rows that it encodes."""

    state: int
    batch: int
    peak: int
    before: int
    resident: int
    sent: Mapping[str, int]
    balance: float
    rows: int
    patches: int
    seconds: float
    loss: float


def make_document(config: Qwen2VLConfig, content: Content, number: int) -> Document:
    """Random text, of which the second half is supervised, after a video in one colour pattern."""
    rng = np.random.default_rng(number)
    shown: list[Media] = []
    ids = rng.integers(PAD + 1, config.decoder.vocab, content.tokens)
    if content.frames:
        shown.append(media("video", (content.frames, content.side, content.side), config.vision.merge))
        ids[: content.visual_tokens + 2] = [VISION_START, *[VIDEO] * content.visual_tokens, VISION_END]
    weights = np.zeros(content.tokens, dtype=np.float32)
    weights[-max(1, content.text // 2) :] = 1
    pixels = rng.standard_normal((1, config.vision.patch_width), dtype=np.float32)
    rows = sum(one.patches for one in shown)
    return Document(
        ids_T=ids,
        positions_AT=get_family("qwen2_vl").positions(config, ids, shown, (number, 0, 0)),
        weights_T=weights,
        media=tuple(shown),
        patches=np.broadcast_to(pixels, (rows, config.vision.patch_width)),
    )


def train_step(job: Job) -> RankMemory:
    """One step on this rank of ring × Ulysses ranks."""
    before = resident_bytes()
    family, config, device = get_family("qwen2_vl"), job.config, torch.device("cpu")
    mesh = Mesh(Layout(ring=job.ring, ulysses=job.ulysses), "cpu")
    modules = family_modules(family, config, options := OptimizerSection(lr=1e-3))
    attend = context_attention(pick_attention("auto")[1], mesh, torch.float32)
    cut = Cut.of((0,), (job.layers,))
    saving = job.recompute, job.loss_rows, job.mlp_rows
    model = StageModel(family, config, mesh, cut, attend, torch.float32, modules, *saving)
    optimizer = build_optimizer(model, options, device)
    model.load(random_source(0, lambda name, shape: family.initial(config, name, shape)), optimizer)
    began = time.monotonic()
    documents = [make_document(config, content, i) for i, content in enumerate(job.contents)]
    total = sum(len(d.ids_T) for d in documents)
    total += -total % mesh.context.size()
    batch = collate(documents, family, config, total, 1, 0, True, device, ContextPlace.of(mesh))
    weight = float(sum(d.weights_T[1:].sum() for d in documents))
    vision, pack = batch.inputs.vision, batch.inputs.documents
    held = [batch.inputs.token_ids_T, batch.inputs.positions_AT, batch.labels_T, batch.weights_T]
    if vision is not None:
        held += [vision.patches_NP, vision.positions_KN, vision.rows_M, vision.picks_CM]
    del documents
    optimizer.zero_grad()
    with LiveBytes() as counted:
        loss = forward_backward(model, GENERATORS["1f1b"](1, 1, None), [batch], weight)
    optimizer.step(1e-3, optimizer.reduce())
    dist.all_reduce(loss)
    return RankMemory(
        state=sum(4 * (group.params.numel() * 2 + group.share * 2) for group in optimizer.groups),
        batch=sum(x.nbytes for x in held),
        peak=counted.peak,
        before=before,
        resident=resident_bytes(),
        sent=attend.sent if isinstance(attend, ContextAttention) else {},
        balance=pack.context.sharding.balance if isinstance(pack, SharedPack) else 1.0,
        rows=len(batch.labels_T),
        patches=0 if vision is None else len(vision.patches_NP),
        seconds=time.monotonic() - began,
        loss=loss.item(),
    )


def resident_bytes() -> int:
    """Most memory that this process has held so far (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["VmHWM"].split()[0]) * 1024


def unequal(tokens: int, shares: Sequence[int], visual: bool, side: int = 16) -> tuple[Content, ...]:
    """Documents of `tokens` in all, in these shares; half of each is a video, or nothing of it."""
    lengths = [tokens * share // sum(shares) for share in shares]
    lengths[0] += tokens - sum(lengths)
    per_frame = side**2 // 4
    frames = [length // 2 // per_frame if visual else 0 for length in lengths]
    return tuple(
        Content(f, side, length - f * per_frame - (2 if f else 0)) for f, length in zip(frames, lengths, strict=True)
    )
