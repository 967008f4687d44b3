"""Boxes and points in pixels as the text that Qwen2-VL grounds with (arXiv 2409.12191 §2.2).

A box part is {"type": "box", "object": "the red car", "box": [x1, y1, x2, y2], "of": 0}: corners in pixels of the
picture file, `of` the number of the image in the conversation, from 0, by default the last one before the part. It
becomes `<|object_ref_start|>the red car<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, coordinates in
thousandths of the picture's width and height. A point part has "point": [x, y] and gives one pair of them. Without
"object" there is no reference: several boxes of one object are a part with "object" and parts without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.media import Media

SCALE = 1000
LENGTHS = {"box": 4, "point": 2}
TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


class Pictures:
    """The images of a conversation, as it is written from its beginning to its end."""

    def __init__(self, media: Sequence[Media]) -> None:
        self._sizes = [one.size for one in media if one.kind == "image"]
        self._shown = 0

    def show(self, kind: str) -> str:
        """The placeholder of the next image or video."""
        self._shown += kind == "image"
        return PLACEHOLDERS[kind]

    def text(self, part: dict[str, Any]) -> str:
        """A box or point part as text. Raises UserError as `coordinates` does."""
        known_fields(part, ("object", part["type"], "of"))
        name = part.get("object", "")
        if not isinstance(name, str):
            raise UserError(f'message content part {shown(part)}: "object" must be text')
        reference = f"<|object_ref_start|>{name}<|object_ref_end|>" if name else ""
        numbers = self.coordinates(part)
        pairs = [f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        return f"{reference}<|box_start|>{','.join(pairs)}<|box_end|>"

    def coordinates(self, part: dict[str, Any]) -> list[int]:
        """Thousandths of the picture's width and height, rounded down, 0 to 999: the far edge is 999 too.

        Raises UserError for coordinates that are not so many numbers, a place outside the picture, a box whose second
        corner lies before its first, and a picture that is not there.
        """
        kind = part["type"]
        places, size = part.get(kind), self._size(part)
        if (
            not isinstance(places, list)
            or len(places) != LENGTHS[kind]
            or not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in places)
        ):
            raise UserError(f'message content part {shown(part)}: "{kind}" must be {LENGTHS[kind]} numbers, in pixels')
        if not all(0 <= n <= side for n, side in zip(places, cycle(size), strict=False)):
            raise UserError(
                f"message content part {shown(part)} lies outside its image of {size[0]}x{size[1]} pixels; give pixels "
                'of the picture file, and "of" if another image is meant'
            )
        if kind == "box" and (places[2] < places[0] or places[3] < places[1]):
            raise UserError(f"message content part {shown(part)}: expected x1 <= x2 and y1 <= y2; swap the corners")
        return [min(int(n * SCALE // side), SCALE - 1) for n, side in zip(places, cycle(size), strict=False)]

    def _size(self, part: dict[str, Any]) -> tuple[int, int]:
        of = part.get("of", self._shown - 1)
        if not isinstance(of, int) or isinstance(of, bool) or not 0 <= of < len(self._sizes):
            raise UserError(
                f"message content part {shown(part)} has no image: {self._shown} come before it and the conversation "
                f'has {len(self._sizes)}; give the number of the one that is meant as "of", from 0'
            )
        return self._sizes[of]


def known_fields(part: dict[str, Any], known: Sequence[str]) -> None:
    """Raises UserError when a part has a field that would be ignored."""
    odd = sorted(part.keys() - {"type", *known})
    if odd:
        raise UserError(f"message content part {shown(part)} has {odd[0]!r}; its fields are {', '.join(known)}")


def shown(part: dict[str, Any]) -> str:
    """A part in an error message."""
    return json.dumps(part, ensure_ascii=False, default=repr)
