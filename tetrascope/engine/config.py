"""The configuration of a run, section by section; config_file.py reads it from YAML."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from tetrascope.errors import UserError
from tetrascope.models.media import MEDIA_OPTIONS
from tetrascope.parallel.context.attention import Exchange
from tetrascope.parallel.mesh import Layout

Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moving average."""

PartName = Literal["language", "vision", "adaptor"]
"""Parts of a model that can start from checkpoints of their own."""

LossWeighting = Literal["token", "sample", "sqrt"]
"""What a supervised token's weight in the loss depends on."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which model.

    init_from: a Hugging Face folder to start from, or one for each of some parts, `{language: ..., vision: ...,
    adaptor: ...}`; parts without a folder start at random. preset: a published size, to train from scratch or from
    parts; with one folder, the size that it must have. config: the family's configuration, to train from scratch or
    from parts; with one folder or preset, changes to theirs, such as position_rule.
    """

    family: str
    preset: str | None = None
    config: dict[str, Any] | None = None
    init_from: Path | dict[PartName, Path] | None = None

    @pydantic.field_validator("init_from", mode="before")
    @classmethod
    def _folder_or_folders(cls, value: Any) -> Any:
        """One clear message instead of one for each type that the value might have had."""
        known = ", ".join(typing.get_args(PartName))
        for part, folder in value.items() if isinstance(value, dict) else [(None, value)]:
            if part is not None and part not in typing.get_args(PartName):
                raise ValueError(f"unknown part {part!r}; known parts: {known}")
            if not isinstance(folder, str | Path) and (part is not None or folder is not None):
                raise ValueError(f"expected a folder, or a folder for each of some parts ({known})")
        if value == {}:
            raise ValueError(f"empty; give a folder for at least one of {known}, or remove it")
        return value


class StoreSection(_Section):
    """How files of other machines are read. retries: of a failed request; concurrency: requests at once in a process;
    requests_per_second: null for no limit; cache_dir: for copies of remote index and row files."""

    retries: NonNegativeInt = 4
    concurrency: PositiveInt = 16
    requests_per_second: PositiveFloat | None = None
    cache_dir: Path | None = None


class CacheSection(_Section):
    """Decoded pictures and frames kept in the folder `dir`, up to so many `bytes`."""

    dir: Path
    bytes: PositiveInt


class SourceSection(_Section):
    """One source of a mixture.

    path: a file, a pattern or an address, as its format takes it. name: in logs, by default from the path. weight: its
    share of the samples drawn, beside the others'. shuffle: null for data.shuffle; blocks: shards or row groups in
    another order, and samples inside each, so that what lies together is read together. root: the folder that files of
    its samples must lie in, by default that of `path`. chat and what follows: null for those of `data`. options: of
    the format.
    """

    path: str
    name: str = ""
    format: str = "auto"
    weight: PositiveFloat = 1.0
    shuffle: bool | Literal["blocks"] | None = None
    root: str | None = None
    chat: str | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    max_tiles: PositiveInt | None = None
    fps: PositiveFloat | None = None
    min_frames: PositiveInt | None = None
    max_frames: PositiveInt | None = None
    video_max_pixels: PositiveInt | None = None
    options: dict[str, Any] = {}

    def media(self) -> dict[str, Any]:
        """Choices about images and videos, null where `data` decides."""
        return {name: getattr(self, name) for name in MEDIA_OPTIONS}

    def shuffled(self, data: DataSection) -> bool:
        """Whether the source's samples come in another order in every epoch."""
        return data.shuffle if self.shuffle is None else bool(self.shuffle)


class DataSection(_Section):
    """What to train on.

    train: one source, for short. sources: several, drawn from by weight. shuffle: anew in every epoch; false reads the
    file in its order, for a curriculum. chat: chat format, null for the family's own. max_tokens: longest sample.
    overlong: what becomes of longer ones, an error, dropped, or split between exchanges. max_bad_samples: how many
    samples may be unusable before the run stops, below 1 as a share of all. max_image_pixels: largest image that is
    opened. index_dir: for indexes, by default in output.dir; index_workers: processes that make them, null for as many
    as there are cores. workers: processes of each rank that read and decode, 0 for none besides the rank's own;
    prefetch: steps prepared ahead. decoder: of images, auto, pillow or dali. decode_cache: null for none. store: how
    remote files are read. How images and videos become tokens, null for the
    family's own choice: min_pixels, max_pixels: area of an image; max_tiles: tiles of an image; fps, min_frames,
    max_frames: frames taken from a video; video_max_pixels: area of a frame.
    """

    train: Path | None = None
    sources: list[SourceSection] = []
    tokenizer: Path
    shuffle: bool = True
    chat: str | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    max_tiles: PositiveInt | None = None
    fps: PositiveFloat | None = None
    min_frames: PositiveInt | None = None
    max_frames: PositiveInt | None = None
    video_max_pixels: PositiveInt | None = None
    max_tokens: PositiveInt = 32768
    overlong: Literal["error", "drop", "split"] = "error"
    max_bad_samples: Annotated[float, Field(ge=0)] = 0.001
    max_image_pixels: PositiveInt = 178956970
    index_dir: Path | None = None
    index_workers: PositiveInt | None = None
    workers: NonNegativeInt = 0
    prefetch: PositiveInt = 1
    decoder: str = "auto"
    decode_cache: CacheSection | None = None
    store: StoreSection = StoreSection()

    @pydantic.model_validator(mode="after")
    def _one_or_several(self) -> DataSection:
        if (self.train is None) == (not self.sources):
            raise ValueError("give either train (one source) or sources (several)")
        names = [section.name for section in self.all_sources()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called {twice[0]!r}; give them names of their own")
        return self

    def all_sources(self) -> list[SourceSection]:
        """The sources, each with a name."""
        if self.train is not None:
            return [SourceSection(path=str(self.train), name="train")]
        return [s if s.name else s.model_copy(update={"name": _stem(s.path)}) for s in self.sources]


def _stem(path: str) -> str:
    """A short name for a path, an address or a module."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]).strip("-") or "source"


class BatchSection(_Section):
    """The global batch, by tokens or by samples, and how much a supervised token of it counts.

    tokens, pack: a budget of `tokens` in tokens / pack micro-batches of at most `pack` tokens each, whatever the
    layout. samples, micro_batches: so many samples, in so many micro-batches on every data-parallel rank. loss: weight
    of a supervised token of a sample with n of them, token: 1, sample: 1/n, sqrt: 1/sqrt(n).
    """

    samples: PositiveInt | None = None
    micro_batches: PositiveInt = 1
    tokens: PositiveInt | None = None
    pack: PositiveInt | None = None
    loss: LossWeighting = "token"

    @pydantic.model_validator(mode="after")
    def _by_samples_or_by_tokens(self) -> BatchSection:
        if (self.samples is None) == (self.tokens is None) or (self.tokens is None) != (self.pack is None):
            raise ValueError("give either samples (and micro_batches), or tokens and pack")
        if self.tokens is not None and self.pack is not None:
            if self.tokens % self.pack:
                near = max(1, round(self.tokens / self.pack)) * self.pack
                raise ValueError(f"tokens must be a multiple of pack={self.pack}, for example {near}")
            if self.micro_batches != 1:
                raise ValueError("with tokens, there are tokens / pack micro-batches; remove micro_batches")
        return self

    @property
    def packs(self) -> int | None:
        """Micro-batches of a step over all ranks, None when samples are counted."""
        return None if self.tokens is None or self.pack is None else self.tokens // self.pack

    def per_rank(self, dp: int) -> int:
        """Micro-batches of a step on each of `dp` ranks. Raises UserError when they do not divide."""
        packs = self.packs
        if packs is None or self.pack is None:
            return self.micro_batches
        if packs % dp:
            fitting = ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
            raise UserError(
                f"batch.tokens: {self.tokens} tokens in packs of {self.pack} make {packs} micro-batches, which do not "
                f"divide by parallel.dp={dp}; use dp of {fitting}, or batch.tokens={-(-packs // dp) * dp * self.pack}"
            )
        return packs // dp


class ParallelSection(_Section):
    """Sizes of the axes, and the pipeline. dp: null means what the started ranks leave.

    ring, ulysses: of context parallelism. context: ranks that share a micro-batch, of which ring and ulysses are then
    chosen for the model and the machine (`context_degrees`) unless they are given.
    schedule: gpipe, 1f1b, interleaved, zb-h1, zb-v; cost, made for each step's micro-batches; or a file of actions.
    virtual_stages: chunks of the model a stage, null for what the schedule needs. placement: of the chunks of `cost`,
    round after round over the stages, or folded into a V. vision_chunk: whether the vision encoder is a chunk of its
    own, so that it can run ahead; null: with `cost`. memory_gib: of activations a stage, which `cost` keeps within;
    null: as much as 1F1B takes. hardware: the machine by whose profile, or file, costs are weighed; auto: cpu, or on
    GPUs h100-sxm. split: decoder layers of every chunk, or auto.
    """

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt | None = 1
    ring: PositiveInt = 1
    ulysses: PositiveInt = 1
    context: PositiveInt | None = None
    schedule: str = "1f1b"
    virtual_stages: PositiveInt | None = None
    placement: Literal["loop", "fold"] = "loop"
    vision_chunk: bool | None = None
    memory_gib: PositiveFloat | None = None
    hardware: str = "auto"
    split: Literal["auto"] | list[PositiveInt] = "auto"

    @pydantic.model_validator(mode="after")
    def _degrees_multiply(self) -> ParallelSection:
        both = self.ring * self.ulysses
        if self.context is not None and both not in (1, self.context):
            raise ValueError(
                f"ring={self.ring} and ulysses={self.ulysses} make {both} ranks, context says {self.context}; leave "
                "them out, to have them chosen, or give both so that they multiply to it"
            )
        return self

    @property
    def chooses_degrees(self) -> bool:
        """Whether ring and ulysses follow from `context`."""
        return self.context is not None and self.ring * self.ulysses != self.context

    def layout(self, world: int | None = None) -> Layout:
        """The layout for `world` started ranks (None: as many as the axes say).

        Where `context` is still to be divided, all of it is in the ring, which any model allows.
        Raises UserError when the axes do not multiply to it.
        """
        ring = self.context if self.chooses_degrees and self.context else self.ring
        context = f"ring={self.ring}, ulysses={self.ulysses}" if self.context is None else f"context={self.context}"
        axes = f"pp={self.pp}, {context}, tp={self.tp}"
        rest = self.pp * ring * self.ulysses * self.tp
        dp = self.dp
        if dp is None:
            if (world or rest) % rest:
                raise UserError(f"parallel: {world} ranks do not divide by {axes} ({rest}); change one of them")
            dp = (world or rest) // rest
        if world is not None and dp * rest != world:
            raise UserError(
                f"parallel: dp={dp}, {axes} make {dp * rest} ranks, but {world} were started; start {dp * rest} "
                f"ranks (--nproc-per-node times --nnodes) or change the axes, for example parallel.dp=null"
            )
        return Layout(pp=self.pp, dp=dp, ring=ring, ulysses=self.ulysses, tp=self.tp)


class ModuleSettings(_Section):
    """What differs from the general settings for some parameters. A frozen one keeps its value and costs no memory
    but its own. lr: at the top of the schedule, which all learning rates follow."""

    frozen: bool | None = None
    lr: PositiveFloat | None = None
    weight_decay: float | None = Field(default=None, ge=0)

    @pydantic.model_validator(mode="after")
    def _frozen_takes_nothing_else(self) -> ModuleSettings:
        if self.frozen and (self.lr is not None or self.weight_decay is not None):
            raise ValueError("what is frozen has no lr and no weight_decay; remove them, or frozen")
        return self


class OptimizerSection(_Section):
    """AdamW with linear warm-up and cosine decay to lr·min_lr_ratio. clip: gradient norm, null for none.

    weight_decay: for matrices; biases and norms have none. modules: settings for parts of the model, by module
    (vision, adaptor, language, embeddings) or by a regular expression that matches whole parameter names; later
    entries override earlier ones, field by field.
    """

    lr: PositiveFloat
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: NonNegativeInt = 0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    clip: PositiveFloat | None = 1.0
    modules: dict[str, ModuleSettings] = {}


class TrainSection(_Section):
    """How long and where. threads: CPU threads a rank. recompute: activations of layers in the backward instead of
    keeping them, none or full. loss_rows: rows of logits that are held at once, null for all; mlp_rows: rows that the
    decoder's MLPs see at once, null for all; both for long sequences. save_every, log_every: in steps."""

    steps: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt = 1
    recompute: Literal["none", "full"] = "none"
    loss_rows: PositiveInt | None = None
    mlp_rows: PositiveInt | None = None
    save_every: PositiveInt = 1000
    log_every: PositiveInt = 1


class KernelsSection(_Section):
    """Which kernels. auto: the fastest that is installed. attention: of whole packs. context: of the parts that a pack
    has under context parallelism. exchange: how keys and values of other ring ranks are reached, piece by piece round
    the ring or gathered at once."""

    attention: str = "auto"
    context: str = "auto"
    exchange: Exchange = "ring"


class OutputSection(_Section):
    """Where the run's files go. export_hf: also write a Hugging Face checkpoint to `hf` inside it at the end."""

    dir: Path
    export_hf: bool = True


class CheckpointSection(_Section):
    """How checkpoints are saved, every `train.save_every` steps and at the end.

    asynchronous: the run goes on while a copy of its state, in host memory, is written. keep_last: how many stay, null
    for all; keep_every: besides these, those of steps that it divides. on_full_disk: what becomes of the run when one
    finds no room. export_hf: also write each, in the background, as a Hugging Face checkpoint to `hf` in output.dir.
    """

    asynchronous: bool = True
    keep_last: PositiveInt | None = None
    keep_every: PositiveInt | None = None
    on_full_disk: Literal["stop", "continue"] = "stop"
    export_hf: bool = False

    @pydantic.model_validator(mode="after")
    def _every_besides_the_last(self) -> CheckpointSection:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every means nothing without keep_last, since all are kept; add keep_last")
        return self


class Config(_Section):
    """A run."""

    model: ModelSection
    data: DataSection
    batch: BatchSection
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection
    train: TrainSection
    kernels: KernelsSection = KernelsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    output: OutputSection
