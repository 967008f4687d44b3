"""From a configuration to this rank's part of the model: checks, stage cut, tensor parallelism, flat parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tetrascope.engine import flops
from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.logical import Shard, shards
from tetrascope.engine.modules import ModuleOptions
from tetrascope.engine.source import Source, fill
from tetrascope.errors import UserError
from tetrascope.models.family import Family, ModelConfig, Stage
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.collect import Collect
from tetrascope.models.sharding import Column, Gather, Replicated, Row, Vocab, rule_for
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.partition import balanced_split, check_layers, check_split, layer_ranges
from tetrascope.parallel.tensor.layers import (
    ColumnParallelLinear,
    GatherTokens,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tetrascope.parallel.tensor.placement import Block, whole
from tetrascope.parallel.zero.flat import FlatGroup, GroupSpec
from tetrascope.parallel.zero.optimizer import ZeroAdamW

TYPICAL_DOCUMENT = 256
"""Tokens of the document that the automatic stage cut is made for."""


def check_layout(family: Family, config: ModelConfig, layout: Layout, split: list[int] | str = "auto") -> None:
    """Raises UserError when the model cannot be laid out so. Needs no process group."""
    if layout.ring * layout.ulysses > 1:
        raise UserError("parallel.ring, parallel.ulysses: context parallelism is not available yet; set both to 1")
    heads = {
        "decoder heads": config.decoder.heads,
        "decoder key/value heads": config.decoder.kv_heads,
        "vision heads": config.vision.heads,
    }
    for what, count in heads.items():
        if count % layout.tp:
            fits = [n for n in range(1, layout.tp) if all(h % n == 0 for h in heads.values())]
            raise UserError(
                f"parallel.tp: {count} {what} do not divide by tp={layout.tp}; this model allows tp up to {max(fits)}"
            )
    first_least = family.first_layers(config)
    check_layers(config.decoder.layers, layout.pp, first_least)
    if not isinstance(split, str):
        check_split(split, config.decoder.layers, layout.pp, first_least)


def stage_layers(family: Family, config: ModelConfig, layout: Layout, split: list[int] | str = "auto") -> list[range]:
    """The decoder layers of every stage; `auto` counts vision encoder and head as what they cost beside a layer."""
    if not isinstance(split, str):
        return layer_ranges(split)
    layer = flops.layer_forward(config, [TYPICAL_DOCUMENT])
    vision = flops.vision_forward(config, [config.typical]) / layer
    head = flops.head_forward(config, TYPICAL_DOCUMENT) / layer
    first_least = family.first_layers(config)
    return layer_ranges(balanced_split(config.decoder.layers, layout.pp, vision, head, first_least))


@dataclass(frozen=True)
class Placed:
    """A local parameter and its place in the whole one."""

    param: nn.Parameter
    blocks: tuple[Block, ...]
    replicated: bool
    """The same on every tensor-parallel rank."""


def _stage_of(name: str, layers: Sequence[range]) -> int:
    """The pipeline stage that holds a parameter of the whole model (a tied head counts as the last stage's)."""
    if name.startswith("layers."):
        layer = int(name.split(".")[1])
        return next(stage for stage, held in enumerate(layers) if layer in held)
    return len(layers) - 1 if name.startswith(("norm.", "head.")) else 0


class StageModel:
    """This rank's part of the model: what its pipeline stage holds, divided over its tensor-parallel group.

    Built without memory first (meta device); `ZeroAdamW`'s flat buffers then become the parameters' memory.

    modules: options of every parameter of the whole model. gradient_borders: see `execute`.
    """

    def __init__(
        self,
        family: Family,
        config: Any,
        mesh: Mesh,
        split: list[int] | str,
        attend: AttentionFn,
        dtype: torch.dtype,
        modules: Mapping[str, ModuleOptions],
    ) -> None:
        self.family, self.config, self.mesh, self.modules = family, config, mesh, modules
        layers = stage_layers(family, config, mesh.layout, split)
        self.layers = layers[mesh.index("pp")]
        self.gradient_borders = self._gradient_borders(layers)
        with torch.device("meta"):
            stage = Stage(self.layers, first=mesh.first_stage, last=mesh.last_stage)
            self.module = family.build(config, stage, attend).to(dtype)
        self.placed = dict(self._divide())
        for name, placed in self.placed.items():
            placed.param.requires_grad_(not modules[name].frozen)
        self._weights = family.weights(config)

    def _divide(self) -> Iterator[tuple[str, Placed]]:
        """Applies the sharding table; yields every parameter once (a tied one under its first name)."""
        table = self.family.sharding(self.config)
        group = self.mesh.group("tp")
        owners = [n for n, module in self.module.named_modules() if module._parameters or isinstance(module, Collect)]
        made: dict[int, nn.Parameter] = {}
        for name in owners:
            module = self.module.get_submodule(name)
            rule = rule_for(table, name)
            original = {key: id(param) for key, param in module._parameters.items() if param is not None}
            if isinstance(rule, Column) and isinstance(module, nn.Linear):
                module = ColumnParallelLinear(module, rule.segments, group, rule.gather)
            elif isinstance(rule, Row) and isinstance(module, nn.Linear):
                module = RowParallelLinear(module, group, rule.scatter)
            elif isinstance(rule, Vocab) and isinstance(module, nn.Embedding):
                module = VocabParallelEmbedding(module, group)
            elif isinstance(rule, Gather) and isinstance(module, Collect):
                module = GatherTokens(group)
            elif not isinstance(rule, Replicated) or isinstance(module, Collect):
                raise UserError(
                    f"sharding table: {type(rule).__name__} cannot divide {name}, a {type(module).__name__}"
                )
            self.module.set_submodule(name, module)
            blocks = getattr(module, "blocks", {})
            for key, identity in original.items():
                if identity in made:  # tied within this stage: keep one parameter
                    module._parameters[key] = made[identity]
                    continue
                param = module.get_parameter(key)
                made[identity] = param
                place = blocks.get(key, whole(tuple(param.shape)))
                yield f"{name}.{key}", Placed(param, place, key not in blocks)

    def _gradient_borders(self, layers: Sequence[range]) -> tuple[bool, bool]:
        """Whether anything before this stage is trained, and whether anything before the next one is."""
        first = min(_stage_of(name, layers) for name, own in self.modules.items() if not own.frozen)
        stage = self.mesh.index("pp")
        return first < stage, first <= stage

    def group_specs(self, base_lr: float) -> list[GroupSpec]:
        """Parameters by how they are updated and reduced: tied, frozen, replicated or divided, decay for matrices
        only, learning rate relative to `base_lr`."""
        tied = self._tied_across_stages()
        groups: dict[tuple[bool, bool, bool, float, float], dict[str, nn.Parameter]] = {}
        for name, placed in self.placed.items():
            own = self.modules[name]
            decay = own.weight_decay if placed.param.ndim > 1 else 0.0
            rate = (decay, own.lr / base_lr) if not own.frozen else (0.0, 0.0)
            groups.setdefault((name == tied, own.frozen, placed.replicated, *rate), {})[name] = placed.param
        return [
            GroupSpec(
                params=params,
                weight_decay=decay,
                partial=replicated,
                tied=is_tied,
                counted=self.owns(next(iter(params))),
                lr_scale=lr_scale,
                frozen=frozen,
            )
            for (is_tied, frozen, replicated, decay, lr_scale), params in sorted(groups.items())
        ]

    def trained_tensors(self) -> set[str]:
        """The logical tensors of the whole model that are trained: those that have optimizer moments."""
        trained = [pieces for name, pieces in self._weights.items() if not self.modules[name].frozen]
        return {piece.tensor.name for pieces in trained for piece in pieces}

    def _tied_across_stages(self) -> str | None:
        """The parameter of this stage that is made of the same logical tensors as one on another stage."""
        for name in self.placed:
            twins = [twin for twin, pieces in self._weights.items() if twin != name and pieces == self._weights[name]]
            if twins and not self.module_has(twins[0]):
                return name
        return None

    def module_has(self, name: str) -> bool:
        """Whether this stage has a parameter of that name, tied ones included."""
        return name in dict(self.module.named_parameters(remove_duplicate=False))

    def owns(self, name: str) -> bool:
        """Whether this rank is the one that saves a parameter, among those that hold the same part of it."""
        if self.placed[name].replicated and self.mesh.index("tp") > 0:
            return False
        return not (name == self._tied_across_stages() and not self.mesh.first_stage)

    def shards(self, name: str, start: int, flat: torch.Tensor) -> list[Shard]:
        """The elements [start, start + len(flat)) of a local parameter as shards of logical tensors."""
        placed = self.placed[name]
        return shards(flat, start, tuple(placed.param.shape), placed.blocks, self._weights[name])

    def flat_shards(self, group: FlatGroup, flat: torch.Tensor) -> Iterator[tuple[str, Shard]]:
        """(parameter name, shard) for all that lies in this rank's share `flat` of a flat group."""
        stop_of_share = group.start + group.share
        for name, span in group.spans.items():
            low, high = max(span.start, group.start), min(span.stop, stop_of_share)
            if low < high:
                run = flat[low - group.start : high - group.start]
                for shard in self.shards(name, low - span.start, run):
                    yield name, shard

    def load(self, source: Source, optimizer: ZeroAdamW) -> None:
        """Fills each rank's own share from a source, masters where there are any, and from them all parameters."""
        for group in optimizer.groups:
            fill((shard for _, shard in self.flat_shards(group, group.values)), source)
            group.publish()


def build_optimizer(model: StageModel, options: OptimizerSection, device: torch.device) -> ZeroAdamW:
    """ZeRO-1 AdamW over the model's parameters, which get their memory here."""
    return ZeroAdamW(
        model.group_specs(options.lr),
        model.mesh,
        device,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        clip=options.clip,
    )
