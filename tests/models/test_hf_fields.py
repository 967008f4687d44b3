"""A config.json with values of a wrong type or form is a UserError in every family, whoever finds the fault."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, get_family
from tetrascope.models.hf_fields import first_token, need

WRONG: list[Any] = ["x", None, [], {}, -1]


def config_json(name: str) -> dict[str, Any]:
    family = get_family(name)
    written: dict[str, Any] = family.to_hf(next(iter(family.presets.values()))(), "bfloat16")
    return written


def places(raw: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields, sections before what is in them."""
    found = []
    for key, value in raw.items():
        found.append((*above, key))
        found += places(value, (*above, key)) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_field_with_every_kind_of_wrong_value(name: str) -> None:
    family, raw = get_family(name), config_json(name)
    family.from_hf(copy.deepcopy(raw))
    refused = 0
    for *above, field in places(raw):
        for value in WRONG:
            changed = copy.deepcopy(raw)
            section = changed
            for key in above:
                section = section[key]
            section[field] = value
            try:
                family.from_hf(changed)  # fine where the field means nothing to the model
            except UserError as error:
                assert "config" in str(error)
                refused += 1
    assert refused > 100


def test_the_field_is_named() -> None:
    with pytest.raises(UserError, match=r"config\.json: .*'hidden_size' expected int, got str.* wrong type or form"):
        get_family("qwen2_vl").from_hf(config_json("qwen2_vl") | {"text_config": {"hidden_size": "wide"}})


def test_small_ones() -> None:
    assert [first_token(token, 7) for token in (None, 3, [4, 5])] == [7, 3, 4]
    need("act", "silu", "silu")
    with pytest.raises(UserError, match=r"config\.json: act is 'relu'; only 'silu' is available"):
        need("act", "relu", "silu")
