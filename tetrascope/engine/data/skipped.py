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

    def restore(self, lines: Iterable[str]) -> None:
        """Remembers what an earlier part of the run wrote; a line that was cut off is passed over."""
        for line in lines:
            try:
                skip = Skip(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self._seen[skip.source, skip.sample] = skip

    def add(self, skips: Iterable[Skip]) -> list[Skip]:
        """Notes what was skipped; returns what is new. Raises UserError with a summary when it is too much."""
        new = []
        for skip in skips:
            if (skip.source, skip.sample) not in self._seen:
                self._seen[skip.source, skip.sample] = skip
                new.append(skip)
        if new and self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(asdict(skip), ensure_ascii=False) + "\n" for skip in new)
        if len(self) > self._limit:
            raise UserError(
                f"data.max_bad_samples: {len(self)} samples cannot be used, more than the {self._limit} that "
                f"{self._bound:g} allows ({self.summary()}). Repair the data or raise the bound"
            )
        return new

    def __len__(self) -> int:
        """Samples that count against the bound."""
        return sum(skip.kind not in CHOSEN for skip in self._seen.values())

    def seen(self) -> list[Skip]:
        """All that was skipped."""
        return list(self._seen.values())

    def summary(self) -> str:
        """Numbers by kind, with the last of each kind."""
        last = {skip.kind: skip for skip in self._seen.values()}
        counts = Counter(skip.kind for skip in self._seen.values())
        return "; ".join(f"{kind}: {n}, last: {last[kind].reason}" for kind, n in counts.most_common())
