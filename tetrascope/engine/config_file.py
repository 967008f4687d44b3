"""Reads a configuration: YAML with `key=value` overrides, and one line for each thing that is wrong with it."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any

import pydantic
import yaml

from tetrascope.engine.config import Config
from tetrascope.errors import UserError


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides (values are YAML too).

    Raises UserError for a missing or unreadable file, an unknown key (naming the nearest), or a wrong type.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path of the configuration") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, such as model: and data:")
    for override in overrides or []:
        _apply(raw, override)
    return validated(Config, raw, str(path))


def validated(target: Any, raw: Any, where: str) -> Any:
    """`raw` as an instance of `target` (pydantic model or dataclass). Raises UserError that names file and field."""
    try:
        return pydantic.TypeAdapter(target).validate_python(raw)
    except pydantic.ValidationError as error:
        lines = [_explain(target, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from error


class _Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error; plain YAML would drop the first one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} comes twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: expected section.key=value, as in train.steps=100")
    place = raw
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"override {override!r}: {part!r} is a value, not a section")
    try:
        place[parts[-1]] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {value!r} is not valid YAML") from error


def _explain(target: Any, problem: Any) -> str:
    """One validation error as field, expectation and remedy."""
    # Where a value may be of several types, pydantic adds the type it tried, such as "literal['auto']".
    # A regular expression, the user's own key below `modules`, may look like that too.
    parts = [str(part) for part in problem["loc"]]
    location = [
        part for before, part in zip(["", *parts], parts, strict=False) if "[" not in part or before == "modules"
    ]
    field = ".".join(location)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields(target, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {field!r}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{field!r} is missing; add it"
    return f"{field!r} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields(target: Any, location: list[str]) -> list[str]:
    """Names that are known at a place of the configuration."""
    for part in location:
        if typing.get_origin(target) is dict:  # any key, values of one type
            target = typing.get_args(target)[1]
            continue
        fields = getattr(target, "model_fields", None) or getattr(target, "__dataclass_fields__", {})
        if part not in fields:
            return []
        field = fields[part]
        target = field.annotation if hasattr(field, "annotation") else _resolve(target, part)
    fields = getattr(target, "model_fields", None) or getattr(target, "__dataclass_fields__", {})
    return sorted(fields)


def _resolve(owner: type, name: str) -> Any:
    """The type of a dataclass field, whose annotation may be a string."""
    return typing.get_type_hints(owner)[name]
