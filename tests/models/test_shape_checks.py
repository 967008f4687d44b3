"""Checks that all families make of their sizes, through each family's own configuration."""

from __future__ import annotations

import dataclasses

import pytest

from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, get_family
from tetrascope.tools.verify.families import get_oracle


def with_head_width(name: str, width: int) -> object:
    """The family's tiny configuration with heads of another width than hidden / heads."""
    config = next(iter(get_oracle(name).variants().values())).config
    decoder = dataclasses.replace(config.decoder, head_dim=width)
    changes = {"mrope_section": (width // 2, 0, 0)} if hasattr(config, "mrope_section") else {}
    return dataclasses.replace(config, decoder=decoder, **changes)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_head_width_that_config_json_cannot_say_is_refused(name: str) -> None:
    """A family either writes the width of its heads to config.json and reads it again, or has none of its own."""
    width = 2 * next(iter(get_oracle(name).variants().values())).config.decoder.head_dim
    family = get_family(name)
    if name in ("qwen2_vl", "qwen2_5_vl", "llava_onevision", "internvl"):
        with pytest.raises(UserError, match=rf"decoder\.head_dim: {width} must be hidden / heads"):
            with_head_width(name, width)
    else:
        assert family.from_hf(family.to_hf(with_head_width(name, width), "float32")).decoder.head_dim == width


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize(("section", "field"), [("decoder", "layers"), ("decoder", "rope_theta"), ("vision", "heads")])
def test_sizes_must_be_positive(name: str, section: str, field: str) -> None:
    config = next(iter(get_oracle(name).variants().values())).config
    with pytest.raises(UserError, match=rf"model\.config\.{section}\.{field}: 0 must be greater than 0"):
        dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: 0})})
