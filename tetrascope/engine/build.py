"""From a configuration to this rank's part of the model: checks, stage cut, tensor parallelism, flat parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tetrascope.engine.config import OptimizerSection
from tetrascope.engine.logical import Shard, shards
from tetrascope.engine.modules import ModuleOptions
from tetrascope.engine.recompute import Recompute, recompute_layers, tile_mlps
from tetrascope.engine.source import Source, fill
from tetrascope.errors import UserError
from tetrascope.models.family import Family, ModelConfig, Stage
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.collect import Collect
from tetrascope.models.sharding import Column, Gather, Replicated, Row, ShardingTable, Vocab, rule_for
from tetrascope.parallel.context.attention import ContextAttention, check_heads
from tetrascope.parallel.context.deliver import DeliverFeatures
from tetrascope.parallel.mesh import Layout, Mesh
from tetrascope.parallel.pipeline.cut import Cut
from tetrascope.parallel.tensor.collectives import gather_tokens
from tetrascope.parallel.tensor.layers import (
    ColumnParallelLinear,
    GatherTokens,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tetrascope.parallel.tensor.placement import Block, whole
from tetrascope.parallel.zero.flat import FlatGroup, GroupSpec
from tetrascope.parallel.zero.optimizer import ZeroAdamW


def check_layout(family: Family, config: ModelConfig, layout: Layout) -> None:
    """Raises UserError when the model cannot be divided so. Needs no process group."""
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
    check_heads(config.decoder.heads, config.decoder.kv_heads, layout.tp, layout.ulysses)


@dataclass(frozen=True)
class Placed:
    """A local parameter and its place in the whole one."""

    param: nn.Parameter
    blocks: tuple[Block, ...]
    replicated: bool
    """The same on every tensor-parallel rank."""


class StageModel:
    """This rank's part of the model: the chunks of its pipeline stage, divided over its tensor-parallel group.

    Built without memory first (meta device); `ZeroAdamW`'s flat buffers then become the parameters' memory.

    modules: options of every parameter of the whole model. recompute: see `recompute_layers`. loss_rows: rows of logits
    that are held at once; the last chunk then gives the head's input, gathered, instead of logits (None: all rows).
    mlp_rows: rows that the decoder's MLPs see at once, see `tile_mlps` (None: all).
    """

    def __init__(
        self,
        family: Family,
        config: Any,
        mesh: Mesh,
        cut: Cut,
        attend: AttentionFn,
        dtype: torch.dtype,
        modules: Mapping[str, ModuleOptions],
        recompute: Recompute = "none",
        loss_rows: int | None = None,
        mlp_rows: int | None = None,
    ) -> None:
        self.family, self.config, self.mesh, self.cut, self.modules = family, config, mesh, cut, modules
        self.loss_rows = loss_rows
        self.chunks: dict[int, Any] = {}
        """The chunks of this stage by number; the vision encoder is part of the one with the embedding."""
        with torch.device("meta"):
            for chunk in cut.chunks(mesh.index("pp")):
                if chunk >= cut.first:
                    stage = Stage(cut.layers[chunk], first=chunk == cut.first, last=chunk == cut.last)
                    self.chunks[chunk] = family.build(config, stage, attend).to(dtype)
        self._tie_here()
        if mesh.context.size() > 1 and cut.first in self.chunks:
            gradients = any(not own.frozen for name, own in modules.items() if name.startswith(("vision.", "adaptor.")))
            self.chunks[cut.first].deliver = DeliverFeatures(mesh.context, gradients)
        self.placed = dict(self._divide())
        for name, placed in self.placed.items():
            placed.param.requires_grad_(not modules[name].frozen)
        self._weights = family.weights(config)
        if loss_rows is not None and self.holds_last:
            self.head.forward = partial(gather_tokens, group=mesh.group("tp"))
        if mlp_rows is not None:
            for module in self.chunks.values():
                tile_mlps(module, mlp_rows, mesh.size("tp"))
        if recompute == "full":
            keep = attend.keep_results if isinstance(attend, ContextAttention) else None
            for module in self.chunks.values():
                recompute_layers(module, keep)

    @property
    def holds_last(self) -> bool:
        """Whether this stage has the output head and computes the loss."""
        return self.cut.last in self.chunks

    @property
    def head(self) -> Any:
        """The output head, on the stage that holds it."""
        return self.chunks[self.cut.last].head

    @property
    def layers(self) -> list[int]:
        """The decoder layers of this stage."""
        return [layer for chunk in self.chunks for layer in self.cut.layers[chunk]]

    def run(self, chunk: int, inputs: Inputs, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A chunk's forward on what the chunk before gave.

        Visual tokens `[M, H]` from the vision encoder's chunk (none for text), hidden states `[T/tp, H]` from others,
        logits `[T, V/tp]` from the last, or with `loss_rows` the head's input `[T, H]`.
        """
        if chunk < self.cut.first:
            return () if inputs.vision is None else tuple(self.chunks[chunk + 1].visual_tokens(inputs.vision))
        if chunk > self.cut.first:
            return (self.chunks[chunk](inputs, *given),)
        return (self.chunks[chunk](inputs, visual=given if self.cut.vision_chunk else None),)

    def _tie_here(self) -> None:
        """One parameter for embedding and head where both are on this stage, but in different chunks."""
        first, last = (self.chunks.get(chunk) for chunk in (self.cut.first, self.cut.last))
        if self.config.decoder.tied_embeddings and first is not None and last is not None:
            last.head.weight = first.embed.weight

    def _divide(self) -> Iterator[tuple[str, Placed]]:
        """Applies the sharding table; yields every parameter once (a tied one under its first name)."""
        table = self.family.sharding(self.config)
        group = self.mesh.group("tp")
        made: dict[int, nn.Parameter] = {}
        for whole_module in self.chunks.values():
            yield from self._divide_chunk(whole_module, table, group, made)

    def _divide_chunk(
        self, chunk: nn.Module, table: ShardingTable, group: dist.ProcessGroup, made: dict[int, nn.Parameter]
    ) -> Iterator[tuple[str, Placed]]:
        """made: parameters by the identity of those that they stand for, to find tied ones."""
        owners = [n for n, module in chunk.named_modules() if module._parameters or isinstance(module, Collect)]
        for name in owners:
            module = chunk.get_submodule(name)
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
            elif isinstance(rule, Replicated) and isinstance(module, nn.Linear):
                module = ReplicatedLinear(module)
            elif not isinstance(rule, Replicated) or isinstance(module, Collect):
                raise UserError(
                    f"sharding table: {type(rule).__name__} cannot divide {name}, a {type(module).__name__}"
                )
            chunk.set_submodule(name, module)
            blocks = getattr(module, "blocks", {})
            for key, identity in original.items():
                if identity in made:  # tied within this stage: keep one parameter
                    module._parameters[key] = made[identity]
                    continue
                param = module.get_parameter(key)
                made[identity] = param
                place = blocks.get(key, whole(tuple(param.shape)))
                yield f"{name}.{key}", Placed(param, place, key not in blocks)

    def group_specs(self, base_lr: float) -> list[GroupSpec]:
        """Parameters by how they are updated and reduced: tied, frozen, replicated or divided, decay for matrices
        only, learning rate relative to `base_lr`."""
        tied = self._tied_across_stages
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

    @cached_property  # compares every parameter with every other
    def _tied_across_stages(self) -> str | None:
        """The parameter of this stage that is made of the same logical tensors as one on another stage."""
        for name in self.placed:
            twins = [twin for twin, pieces in self._weights.items() if twin != name and pieces == self._weights[name]]
            if twins and not self.module_has(twins[0]):
                return name
        return None

    def module_has(self, name: str) -> bool:
        """Whether this stage has a parameter of that name, tied ones included."""
        return any(name in dict(one.named_parameters(remove_duplicate=False)) for one in self.chunks.values())

    def owns(self, name: str) -> bool:
        """Whether this rank is the one that saves a parameter, among those that hold the same part of it."""
        if self.placed[name].replicated and self.mesh.index("tp") > 0:
            return False
        return not (name == self._tied_across_stages and not self.mesh.first_stage)

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
