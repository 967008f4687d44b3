"""The list of families."""

from __future__ import annotations

from typing import Any

import pytest

from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, family_of, get_family
from tetrascope.models.weights import check_cover, logical_tensors, relative


@pytest.mark.parametrize("name", FAMILIES)
def test_families_go_by_their_name(name: str) -> None:
    assert get_family(name).name == name


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model\.family.*'qwen9'.*qwen2_vl"):
        get_family("qwen9")


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_of_a_family_hold_the_same_parameters_each_row_once(name: str) -> None:
    family = get_family(name)
    for preset in family.presets.values():
        config = preset()
        canonical = family.weights(config)
        assert next(iter(family.layouts.values())).weights(config) == canonical
        for layout in family.layouts.values():
            weights = layout.weights(config)
            check_cover(weights)
            assert relative(canonical, weights).keys() == logical_tensors(canonical).keys()
            assert set(layout.copies(config).values()) <= logical_tensors(weights).keys()
            assert "config.json" in layout.configs(config, "float32")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_json_of_a_family_is_recognised(name: str) -> None:
    family = get_family(name)
    config = next(iter(family.presets.values()))()
    for layout in family.layouts.values():
        raw = layout.configs(config, "float32")["config.json"]
        assert family_of(raw) == name
    for architecture in family.architectures:
        assert family_of({"architectures": ["Other", architecture], "model_type": "other"}) == name


def test_model_type_decides_where_no_architecture_is_named() -> None:
    for none in ({}, {"architectures": None}, {"architectures": []}):
        assert family_of({**none, "model_type": "qwen2_vl"}) == "qwen2_vl"


@pytest.mark.parametrize(
    "raw",
    [{}, {"model_type": "bert"}, {"architectures": ["BertModel"], "model_type": "qwen2_vl"}],
)
def test_a_model_that_no_family_knows(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"config\.json: no family knows a model with .*; known families: .*qwen2_vl"):
        family_of(raw)
