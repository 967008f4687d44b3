"""Where a run is in its stream of samples, small enough to lie in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tetrascope.errors import UserError


@dataclass(frozen=True)
class Cursor:
    """What the plan of a step starts from: all that any later plan depends on, besides the data and the settings.

    step: the step to be planned. position: of the next sample of the stream that no step has looked at. waiting:
    (position, step in which it was first looked at) of the samples before it that no step has taken yet, oldest first.
    """

    step: int = 0
    position: int = 0
    waiting: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"step": self.step, "position": self.position, "waiting": [list(pair) for pair in self.waiting]}

    @staticmethod
    def from_json(raw: Any, where: str) -> Cursor:
        """What `to_json` gave. Raises UserError that names `where` when it is not that."""
        try:
            waiting = tuple((int(position), int(since)) for position, since in raw["waiting"])
            cursor = Cursor(int(raw["step"]), int(raw["position"]), waiting)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(_unusable(where)) from error
        positions = [position for position, _ in waiting]
        ordered = positions == sorted(set(positions)) and all(0 <= p < cursor.position for p in positions)
        if cursor.step < 0 or cursor.position < 0 or not ordered or any(s > cursor.step for _, s in waiting):
            raise UserError(_unusable(where))
        return cursor


def _unusable(where: str) -> str:
    return f"{where}: does not say where its run was in the data; remove it to go on from an older checkpoint"
