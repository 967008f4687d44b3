"""Everything that can be checked and read before the first process group exists."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tetrascope.engine.build import check_layout
from tetrascope.engine.config import Config, validated
from tetrascope.engine.data.dataset import load_tokenizer
from tetrascope.engine.source import HuggingFaceFolder, Source, random_source, read_hf_config
from tetrascope.engine.storage import check_writable
from tetrascope.errors import UserError
from tetrascope.models.family import Family, get_family
from tetrascope.models.layers.attention import AttentionFn, pick_attention
from tetrascope.parallel.mesh import Layout
from tetrascope.parallel.pipeline.actions import Schedule, validate
from tetrascope.parallel.pipeline.generators import SCHEDULES


@dataclass(frozen=True)
class Setup:
    """A checked configuration with what it refers to."""

    config: Config
    family: Family
    model_config: Any
    tokenizer: Any
    layout: Layout
    schedule: Schedule
    attention: tuple[str, AttentionFn]

    def source(self) -> Source:
        """Where the first weights come from."""
        if self.config.model.init_from is not None:
            return HuggingFaceFolder(self.config.model.init_from)
        return random_source(
            self.config.train.seed, lambda name, shape: self.family.initial(self.model_config, name, shape)
        )

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
    layout = config.parallel.layout(world)
    family = get_family(config.model.family)
    if config.parallel.schedule not in SCHEDULES:
        raise UserError(
            f"parallel.schedule: unknown {config.parallel.schedule!r}; choose one of {', '.join(sorted(SCHEDULES))}"
        )
    if not config.data.train.is_file():
        raise UserError(f"data.train: {config.data.train} does not exist; make it first or fix the path")
    if config.data.min_pixels > config.data.max_pixels:
        raise UserError(
            f"data.min_pixels: {config.data.min_pixels} is more than data.max_pixels={config.data.max_pixels}; lower it"
        )
    check_writable(config.output.dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model_config = _model_config(config, family, tokenizer)
    if len(tokenizer) > model_config.decoder.vocab:
        raise UserError(
            f"data.tokenizer: has {len(tokenizer)} tokens, the model's vocabulary only {model_config.decoder.vocab}; "
            "use the tokenizer that belongs to the model"
        )
    check_layout(model_config, layout, config.parallel.split)
    schedule = SCHEDULES[config.parallel.schedule](layout.pp, config.batch.micro_batches)
    validate(schedule, config.batch.micro_batches)
    return Setup(config, family, model_config, tokenizer, layout, schedule, pick_attention(config.kernels.attention))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with single keys changed, inside its sections too."""
    both = {key: _merged(base[key], value) for key, value in changes.items() if _sections(base.get(key), value)}
    return {**base, **changes, **both}


def _sections(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _model_config(config: Config, family: Family, tokenizer: Any) -> Any:
    model = config.model
    if model.init_from is not None:
        own = dataclasses.asdict(family.from_hf(read_hf_config(model.init_from)))
        checked = validated(family.config_class, _merged(own, model.config or {}), "model.config")
        pieces = {piece for pieces in family.weights(checked).values() for piece in pieces}
        HuggingFaceFolder(model.init_from).check(pieces)
        return checked
    if model.config is None:
        raise UserError(
            "model: give config (shapes, to train from scratch) or init_from (a Hugging Face folder); neither is there"
        )
    return validated(family.config_class, family.complete(model.config, tokenizer), "model.config")
