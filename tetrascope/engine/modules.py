"""What is trained, and how: freezing, learning rate and weight decay of every parameter.

Pure data, decided on the whole model before any process group exists. Parameters of all families are named alike at
the top level (`vision`, `adaptor`, `embed`, `layers`, `norm`, `head`), so that `MODULES` can name their parts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tetrascope.engine.config import OptimizerSection
from tetrascope.errors import UserError
from tetrascope.models.family import Family
from tetrascope.models.weights import WeightMap
from tetrascope.parallel.pipeline.cut import Cut

MODULES = {
    "vision": r"vision\..*",
    "adaptor": r"adaptor\..*",
    "language": r"(layers|norm)\..*",
    "embeddings": r"(embed|head)\..*",
}
"""Name of a module in the configuration -> regular expression of its parameters' names."""


@dataclass(frozen=True)
class ModuleOptions:
    """How a parameter is trained. lr: at the top of the schedule. weight_decay: if the parameter is a matrix."""

    frozen: bool
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Trained:
    """Which modules have anything trained in them."""

    vision: bool
    adaptor: bool
    language: bool
    embeddings: bool


ALL_TRAINED = Trained(vision=True, adaptor=True, language=True, embeddings=True)


def family_modules(family: Family, config: Any, options: OptimizerSection) -> dict[str, ModuleOptions]:
    """`resolve` for a model of a family: its weight map."""
    return resolve(family.weights(config), options, family.unused(config))


def resolve(
    weights: WeightMap, options: OptimizerSection, always_frozen: Sequence[str] = ()
) -> dict[str, ModuleOptions]:
    """Options of every parameter of the whole model, by name.

    The general settings hold unless an entry of `options.modules` matches; entries are taken in the order written,
    each overriding the fields that it gives. always_frozen: regular expressions of parameters that take no part in
    computing, frozen whatever the entries say.

    Raises UserError for an entry that is no regular expression or matches nothing, for two parameters made of one
    tensor (tied embeddings) that are set differently, and when nothing is left to train.
    """
    found = dict.fromkeys(weights, ModuleOptions(False, options.lr, options.weight_decay))
    for entry, settings in options.modules.items():
        changes = {key: value for key, value in settings.model_dump().items() if value is not None}
        for name in _matched(entry, found):
            found[name] = replace(found[name], **changes)
    for name, own in found.items():
        if any(re.fullmatch(pattern, name) for pattern in always_frozen):
            found[name] = replace(own, frozen=True)
    _check_shared(weights, found)
    if all(own.frozen for own in found.values()):
        raise UserError("optimizer.modules: everything is frozen; leave at least one parameter to train")
    return found


def _matched(entry: str, names: Iterable[str]) -> list[str]:
    """The parameters that an entry of the configuration is about."""
    where = f"optimizer.modules: {entry!r}"
    try:
        pattern = re.compile(MODULES.get(entry, entry))
    except re.error as error:
        raise UserError(
            f"{where} is neither a module ({', '.join(MODULES)}) nor a regular expression: {error}"
        ) from error
    matched = [name for name in names if pattern.fullmatch(name)]
    if matched:
        return matched
    if entry in MODULES:
        raise UserError(f"{where}: this model has no such parameters; remove the entry")
    near = difflib.get_close_matches(entry, MODULES, n=1)
    if near:
        raise UserError(f"{where} matches no parameter; did you mean {near[0]!r}?")
    close = difflib.get_close_matches(entry.replace("\\", ""), list(names), n=1, cutoff=0)
    raise UserError(
        f"{where} matches no parameter; give a module ({', '.join(MODULES)}) or a regular expression that matches "
        f"whole parameter names, such as {re.escape(close[0])!r}"
    )


def _check_shared(weights: WeightMap, found: Mapping[str, ModuleOptions]) -> None:
    """Raises UserError when parameters that are made of the same tensor are set differently.

    The same rows are one parameter. Other rows of a tensor may be trained otherwise, but not frozen otherwise: a
    checkpoint holds a tensor's moments as a whole or not at all.
    """
    first: dict[str, str] = {}
    for name, pieces in weights.items():
        for tensor in {piece.tensor.name for piece in pieces}:
            other = first.setdefault(tensor, name)
            a, b = found[other], found[name]
            if a.frozen and b.frozen:
                continue
            if a.frozen != b.frozen or (a != b and pieces == weights[other]):
                raise UserError(
                    f"optimizer.modules: {other} ({_text(a)}) and {name} ({_text(b)}) are one tensor, {tensor}; "
                    "set both alike"
                )


def _text(options: ModuleOptions) -> str:
    return "frozen" if options.frozen else f"lr {options.lr:g}, weight_decay {options.weight_decay:g}"


def trained(modules: Mapping[str, ModuleOptions]) -> Trained:
    """Which of the modules have a parameter that is trained."""
    names = [name for name, options in modules.items() if not options.frozen]
    return Trained(**{m: any(re.fullmatch(pattern, name) for name in names) for m, pattern in MODULES.items()})


def summary(weights: WeightMap, modules: Mapping[str, ModuleOptions]) -> str:
    """Numbers of trained and frozen parameters of the whole model, tied ones counted once; learning rates if several.

    Example: `1,204,224 parameters trained, 52,000 frozen; lr: vision 1e-05, language 2e-05`.
    """
    # Tied parameters are made of the same pieces, and set alike.
    sizes = {pieces: (sum(_elements(piece) for piece in pieces), modules[name]) for name, pieces in weights.items()}
    counts = {frozen: sum(n for n, own in sizes.values() if own.frozen == frozen) for frozen in (False, True)}
    text = f"{counts[False]:,} parameters trained, {counts[True]:,} frozen"
    if len({own.lr for own in modules.values() if not own.frozen}) == 1:
        return text
    rates = []
    for module, pattern in MODULES.items():
        values = {own.lr for name, own in modules.items() if not own.frozen and re.fullmatch(pattern, name)}
        if values:
            rates.append(f"{module} {' to '.join(f'{lr:g}' for lr in sorted({min(values), max(values)}))}")
    return f"{text}; lr: {', '.join(rates)}"


def _elements(piece: Any) -> int:
    return int(piece.rows * math.prod(piece.tensor.matrix[1:]))


def first_trained(cut: Cut, modules: Mapping[str, ModuleOptions]) -> int:
    """The first chunk of the pipeline that has something trained in it: those before compute no gradients."""
    return min(_chunk_of(name, cut) for name, own in modules.items() if not own.frozen)


def _chunk_of(name: str, cut: Cut) -> int:
    """The chunk that holds a parameter of the whole model (a tied head counts as the last chunk's)."""
    module, _, rest = name.partition(".")
    if module == "layers":
        return cut.chunk_of(int(rest.split(".")[0]))
    return {"vision": 0, "adaptor": 0, "embed": cut.first}.get(module, cut.last)
