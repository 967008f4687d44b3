"""What the README lists is what there is."""

from __future__ import annotations

from pathlib import Path

from tetrascope.models.family import FAMILIES, get_family

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_families() -> None:
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): (row[3].split(", "), row[4].split(", ")) for row in rows if len(row) == 5}
    assert listed == {name: (list(get_family(name).presets), list(get_family(name).layouts)) for name in FAMILIES}
