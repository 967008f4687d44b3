"""The list of families."""

from __future__ import annotations

import pytest

from tetrascope.errors import UserError
from tetrascope.models.family import FAMILIES, get_family


@pytest.mark.parametrize("name", FAMILIES)
def test_families_go_by_their_name(name: str) -> None:
    assert get_family(name).name == name


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model\.family.*'qwen9'.*qwen2_vl"):
        get_family("qwen9")
