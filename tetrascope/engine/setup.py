"""Everything that can be checked and read before the first process group exists."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tetrascope.engine.attention import check_context_kernel
from tetrascope.engine.build import check_layout
from tetrascope.engine.config import Config, DataSection
from tetrascope.engine.config_file import validated
from tetrascope.engine.data.mixture import Mixture, Progress
from tetrascope.engine.data.skipped import SkipLog
from tetrascope.engine.data.tokenizer import load_tokenizer
from tetrascope.engine.modules import ModuleOptions, family_modules
from tetrascope.engine.parts import PartsSource, open_parts
from tetrascope.engine.pipeline import QUESTION_TOKENS, Pipeline, Workload, make_pipeline
from tetrascope.engine.predict import load_hardware
from tetrascope.engine.source import HuggingFaceFolder, Source, random_source, read_hf_config
from tetrascope.engine.storage import check_writable
from tetrascope.errors import UserError
from tetrascope.models.family import Family, ModelConfig, family_of, get_family
from tetrascope.models.layers.attention import AttentionFn, pick_attention
from tetrascope.models.media import MEDIA_OPTIONS
from tetrascope.parallel.context.degrees import context_degrees
from tetrascope.parallel.mesh import Layout


@dataclass(frozen=True)
class Blueprint:
    """What follows from a configuration and the model's sizes alone."""

    config: Config
    family: Family
    model_config: Any
    layout: Layout
    pipeline: Pipeline
    attention: tuple[str, AttentionFn]
    modules: dict[str, ModuleOptions]


@dataclass(frozen=True)
class Setup(Blueprint):
    """A checked configuration with what it refers to."""

    tokenizer: Any

    def source(self) -> Source:
        """Where the first weights come from."""
        init_from = self.config.model.init_from
        if isinstance(init_from, Path):
            return HuggingFaceFolder(init_from, self.family.layouts, self.model_config)
        fresh = random_source(
            self.config.train.seed, lambda name, shape: self.family.initial(self.model_config, name, shape)
        )
        if init_from is None:
            return fresh
        parts = open_parts(init_from, self.family, self.model_config)
        return PartsSource(parts, self.family.weights(self.model_config), fresh)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run, as JSON values."""
        return {
            "family": self.family.name,
            "model": dataclasses.asdict(self.model_config),
            "config": self.config.model_dump(mode="json"),
        }


def prepare(config: Config, world: int | None) -> Setup:
    """Checks a configuration against itself, the model, the tokenizer and the number of started ranks.

    world: ranks that were started, None when they are yet to be. Raises UserError with the remedy.
    """
    family = get_family(config.model.family)
    config.parallel.layout(world)
    if config.data.train is not None and not config.data.train.exists():
        raise UserError(f"data.train: {config.data.train} does not exist; make it first or fix the path")
    check_context_kernel(config)
    check_writable(config.output.dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model_config = _model_config(config, family, tokenizer)
    if len(tokenizer) > model_config.decoder.vocab:
        raise UserError(
            f"data.tokenizer: has {len(tokenizer)} tokens, the model's vocabulary only {model_config.decoder.vocab}; "
            "use the tokenizer that belongs to the model"
        )
    return Setup(**vars(_blueprint(config, family, model_config, world)), tokenizer=tokenizer)


def index_folder(config: Config) -> Path:
    """Where the indexes of a run's sources are kept."""
    return config.data.index_dir or config.output.dir / "index"


def open_data(setup: Setup, progress: Progress | None = None, device: torch.device | str = "cpu") -> Mixture:
    """The run's sources, indexed.

    Raises UserError when one cannot be read, none of its samples can be used, or more of all samples are bad than
    `data.max_bad_samples` allows.
    """
    folder = index_folder(setup.config)
    found = Mixture(setup.config.data, setup.family, setup.model_config, setup.tokenizer, folder, progress, device)
    left_out = found.left_out()
    SkipLog(None, len(found) + len(left_out), setup.config.data.max_bad_samples).add(left_out)
    return found


def blueprint(config: Config, world: int | None) -> Blueprint:
    """The same checks as far as they need no file: the model's sizes are those of `model.preset` or `model.config`.

    What these leave to the tokenizer is taken from it when it is there.

    Raises UserError with the remedy.
    """
    family = get_family(config.model.family)
    raw = _merged(_preset(config, family), config.model.config or {})
    if not raw:
        raise UserError("model.preset: needed to know the model's sizes without its files; add it")
    if config.data.tokenizer.is_dir():
        raw = family.complete(raw, load_tokenizer(config.data.tokenizer))
    model_config = validated(family.config_class, raw, "model.config")
    return _blueprint(config, family, model_config, world)


def _blueprint(config: Config, family: Family, model_config: Any, world: int | None) -> Blueprint:
    check_media_options(config.data, family)
    config = with_degrees(config, model_config)
    layout = config.parallel.layout(world)
    check_layout(family, model_config, layout)
    modules = family_modules(family, model_config, config.optimizer)
    work = _workload(config, model_config, layout)
    parallel = config.parallel.model_copy(update={"dp": layout.dp})
    pipeline = make_pipeline(family, model_config, parallel, modules, work)
    attention = pick_attention(config.kernels.attention)
    return Blueprint(config, family, model_config, layout, pipeline, attention, modules)


def with_degrees(config: Config, model_config: ModelConfig) -> Config:
    """The configuration with ring and ulysses in the place of a `parallel.context` that is still to be divided."""
    parallel, decoder = config.parallel, model_config.decoder
    if not parallel.chooses_degrees or parallel.context is None:
        return config
    node = load_hardware(profile_of(config)).gpus_per_node
    ring, ulysses = context_degrees(parallel.context, decoder.heads, decoder.kv_heads, parallel.tp, node)
    return config.model_copy(
        update={"parallel": parallel.model_copy(update={"ring": ring, "ulysses": ulysses})},
    )


def _workload(config: Config, model_config: Any, layout: Layout) -> Workload:
    """The run's micro-batches as far as they are known before its data is."""
    batch, count = config.batch, config.batch.per_rank(layout.dp)
    if batch.pack is not None:
        samples = batch.pack // (model_config.typical.tokens + QUESTION_TOKENS)
    else:
        samples = (batch.samples or 1) // (layout.dp * count)
    return Workload(count, max(1, samples), config.train.dtype, config.train.recompute, profile_of(config))


def profile_of(config: Config) -> str:
    """The hardware profile by which a run's costs are weighed: the same on all ranks of a kind."""
    if config.parallel.hardware != "auto":
        return config.parallel.hardware
    return "h100-sxm" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"


def _preset(config: Config, family: Family) -> dict[str, Any]:
    """The configuration of `model.preset`, empty without one. Raises UserError for an unknown one."""
    name = config.model.preset
    if name is None:
        return {}
    if name not in family.presets:
        raise UserError(f"model.preset: unknown {name!r}; {family.name} has {', '.join(family.presets) or 'none'}")
    return dataclasses.asdict(family.presets[name]())


def check_media_options(options: DataSection, family: Family) -> None:
    """Raises UserError for a choice that means nothing to the family, or a chat format that it does not have."""
    given = {name for name in MEDIA_OPTIONS if getattr(options, name) is not None}
    if useless := sorted(given - family.media_options):
        raise UserError(
            f"data.{useless[0]}: means nothing to {family.name}, which knows "
            f"{', '.join(sorted(family.media_options)) or 'none of these options'}; remove it"
        )
    if options.chat is not None and options.chat not in family.chats:
        raise UserError(f"data.chat: unknown {options.chat!r}; {family.name} has {', '.join(family.chats)}")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with single keys changed, inside its sections too."""
    both = {key: _merged(base[key], value) for key, value in changes.items() if _sections(base.get(key), value)}
    return {**base, **changes, **both}


def _sections(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _model_config(config: Config, family: Family, tokenizer: Any) -> Any:
    model = config.model
    if isinstance(model.init_from, Path):
        raw = read_hf_config(model.init_from)
        found = family_of(raw)
        if found != family.name:
            raise UserError(
                f"model.family: {model.init_from}/config.json is of family {found!r}, not {family.name!r}; "
                f"set model.family={found} or give another folder"
            )
        own = dataclasses.asdict(family.from_hf(raw))
        _check_preset(own, _preset(config, family), model.init_from)
        checked = validated(family.config_class, _merged(own, model.config or {}), "model.config")
        HuggingFaceFolder(model.init_from, family.layouts, checked).check()
        return checked
    raw = _merged(_preset(config, family), model.config or {})
    if not raw:
        raise UserError(
            "model: give config (shapes) or preset (a published size), to train from scratch or from separate parts, "
            "or init_from (one Hugging Face folder); none is there"
        )
    checked = validated(family.config_class, family.complete(raw, tokenizer), "model.config")
    for part in open_parts(model.init_from or {}, family, checked):
        part.check()
    return checked


def _check_preset(own: dict[str, Any], preset: dict[str, Any], folder: Path) -> None:
    """Raises UserError when a folder's model is not of the size that `model.preset` names."""
    for section in ("decoder", "vision"):
        for field, value in preset.get(section, {}).items():
            if own[section][field] != value:
                raise UserError(
                    f"model.preset: says {section}.{field}={value}, {folder}/config.json {own[section][field]}; "
                    "correct one of them"
                )
