"""The record of a traced step, as it is kept in a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError
from tetrascope.parallel.pipeline.actions import Schedule, from_text
from tetrascope.parallel.pipeline.simulator import Costs

PHASES = ("data wait", "agreement", "pipeline", "gradient reduction", "optimizer", "other")
"""What a step consists of on every rank, in order; `optimizer` ends with the gathering of the parameters."""


@dataclass(frozen=True)
class TracedAction:
    """An action as text (`F0c1`) and, in seconds from the start of the step, when its stage was free for it, when what
    it needs had arrived, when it was done."""

    action: str
    asked: float
    start: float
    end: float


@dataclass(frozen=True)
class RankTrace:
    """A rank's step: its place on the axes, the ends of `PHASES`, its actions."""

    rank: int
    place: dict[str, int]
    ends: tuple[float, ...]
    actions: tuple[TracedAction, ...]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase."""
        starts = (0.0, *self.ends)
        return {name: end - start for name, start, end in zip(PHASES, starts, self.ends, strict=False)}


@dataclass(frozen=True)
class StepTrace:
    """A step of all ranks.

    schedules, costs: of each data-parallel rank's pipeline, the schedule in its text form and what it costs by the
    machine's profile. vision_chunk: whether chunk 0 is the vision encoder.
    """

    step: int
    ranks: tuple[RankTrace, ...]
    schedules: tuple[str, ...]
    costs: tuple[dict[str, Any], ...]
    vision_chunk: bool

    def schedule(self, dp: int) -> Schedule:
        """The schedule of a data-parallel rank."""
        return from_text(self.schedules[dp])

    def predicted(self, dp: int) -> Costs:
        """What a data-parallel rank's actions were expected to take."""
        return Costs(**self.costs[dp])

    def pipeline(self, dp: int) -> list[RankTrace]:
        """The first rank of each stage of a data-parallel rank's pipeline."""
        first = {"ring": 0, "ulysses": 0, "tp": 0, "dp": dp}
        chosen = [r for r in self.ranks if all(r.place[axis] == at for axis, at in first.items())]
        return sorted(chosen, key=lambda r: r.place["pp"])

    def write(self, folder: Path) -> Path:
        """Writes `step-<number>.json` into a folder, which it makes."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.step}.json"
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path


def read_traces(folder: Path) -> list[StepTrace]:
    """All traced steps in a folder, in order. Raises UserError when there is none or one cannot be read."""
    files = sorted(folder.glob("step-*.json"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UserError(f"{folder}: holds no step-….json; trace a run with train --trace N first")
    traces = []
    for file in files:
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); remove it or trace again") from error
        traces.append(validated(StepTrace, raw, str(file)))
    return traces
