"""Samples that a run could not use: counted by kind, named in `skipped.jsonl`, bounded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tetrascope.errors import UserError

CHOSEN = ("dropped", "split")
"""Kinds that the user asked for: they are named, but do not count against the bound."""


@dataclass(frozen=True)
class Skip:
    """A sample that was left out. kind: one of BAD_KINDS or CHOSEN. step: in which it was drawn, None when its index
    was made."""

    kind: str
    source: str
    sample: int
    reason: str
    step: int | None = None


def bad_limit(bound: float, samples: int) -> int:
    """How many samples may be skipped: `bound` itself from 1 on, below that as a share of all."""
    return int(bound) if bound >= 1 else int(bound * samples)


class SkipLog:
    """What a run has skipped so far, a sample counted once however often it is drawn.

    file: where to write, None on ranks that do not. samples: in all sources, usable or not. bound:
    data.max_bad_samples.
    """

    def __init__(self, file: Path | None, samples: int, bound: float) -> None:
        self._file, self._bound, self._limit = file, bound, bad_limit(bound, samples)
        self._seen: dict[tuple[str, int], Skip] = {}
        self._counted = 0

    def restore(self, lines: Iterable[str], step: int, left_out: Iterable[Skip]) -> None:
        """Remembers what an earlier part of the run wrote and what still holds for one that goes on at `step`.

        That is what steps before it skipped, and what the indexes still leave out. What a killed run skipped later is
        met again, unless it was repaired. A line that was cut off is passed over. `rewrite` makes the file agree.
        """
        still = {(skip.source, skip.sample) for skip in left_out}
        for line in lines:
            try:
                skip = Skip(**json.loads(line))
                holds = skip.step < step if skip.step is not None else (skip.source, skip.sample) in still
            except (ValueError, TypeError):
                continue
            if holds:
                self._note(skip)

    def rewrite(self) -> None:
        """Writes the file anew, whole or not at all, with what is remembered."""
        if self._file is not None and self._file.exists():
            partial = self._file.with_name(f".{self._file.name}")
            partial.write_text("".join(map(_line, self._seen.values())), encoding="utf-8")
            partial.replace(self._file)

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Notes what was skipped; returns what is new. Raises UserError with a summary when it is too much."""
        new = []
        for skip in skips:
            if self._note(skip):
                new.append(skip)
        if new and self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as out:
                out.writelines(map(_line, new))
        if len(self) > self._limit:
            raise UserError(
                f"data.max_bad_samples: {len(self)} samples cannot be used, more than the {self._limit} that "
                f"{self._bound:g} allows ({self.summary()}). Repair the data or raise the bound"
            )
        return new

    def __len__(self) -> int:
        """Samples that count against the bound."""
        return self._counted

    def _note(self, skip: Skip) -> bool:
        """Whether it is new."""
        if (skip.source, skip.sample) in self._seen:
            return False
        self._seen[skip.source, skip.sample] = skip
        self._counted += skip.kind not in CHOSEN
        return True

    def seen(self) -> list[Skip]:
        """All that was skipped."""
        return list(self._seen.values())

    def summary(self) -> str:
        """Numbers by kind, with the last of each kind."""
        last = {skip.kind: skip for skip in self._seen.values()}
        counts = Counter(skip.kind for skip in self._seen.values())
        return "; ".join(f"{kind}: {n}, last: {last[kind].reason}" for kind, n in counts.most_common())


def _line(skip: Skip) -> str:
    return json.dumps(asdict(skip), ensure_ascii=False) + "\n"
