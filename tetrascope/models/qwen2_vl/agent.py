"""Transcripts of an agent's steps as text (arXiv 2409.12191 §2.2): several steps inside one assistant turn.

An assistant turn may have parts {"type": "function", "name": "tap", "arguments": {…}}, {"type": "result", "image":
"after.png"} (or "video", or "text") and {"type": "return", "text": "…"}, which become the lines

    *FUNCTION*: tap
    *ARGS*: {"point": [500, 250]}
    *RESULT*: <image>
    *RETURN*: …

A box or a point among the arguments, {"type": "point", "point": [x, y]} in pixels as in grounding.py, becomes its
coordinates in thousandths. The environment gives results, so what they hold is not learned; the word *RESULT*: is,
since there the model stops. A system message may have a part {"type": "actions", "actions": [{"name": …,
"description": …, "parameters": {…}}]}, parameters as JSON schema or in any other JSON form.
"""

from __future__ import annotations

import json
from typing import Any

from tetrascope.errors import UserError
from tetrascope.models.qwen2_vl.grounding import LENGTHS, Pictures, known_fields, shown

STEPS = ("function", "result", "return")
"""Types of the parts of an assistant turn, each on lines of its own."""

INSTRUCTION = (
    "Call a function by writing *FUNCTION*: and its name, and on the next line *ARGS*: and its arguments as a JSON "
    "object. What it gives follows after *RESULT*:. Write your answer after *RETURN*:."
)

Pieces = list[tuple[str, bool]]
"""Text, and whether it is learned where it stands in an assistant turn."""


def step(part: dict[str, Any], pictures: Pictures) -> Pieces:
    """One of STEPS as text. Raises UserError when it lacks something or has something unknown."""
    if part["type"] == "function":
        known_fields(part, ("name", "arguments"))
        name, arguments = _name(part, part), part.get("arguments", {})
        if not isinstance(arguments, dict):
            raise UserError(f'message content part {shown(part)}: "arguments" must be an object')
        return [(f"*FUNCTION*: {name}\n*ARGS*: {_json(_scaled(arguments, pictures))}", True)]
    if part["type"] == "return":
        known_fields(part, ("text",))
        return [(f"*RETURN*: {_text(part)}", True)]
    return [("*RESULT*:", True), (f" {_result(part, pictures)}", False)]


def actions(part: dict[str, Any]) -> str:
    """The functions that the model may call, for the system message. Raises UserError for anything else."""
    known_fields(part, ("actions",))
    listed = part.get("actions")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise UserError(f'message content part {shown(part)}: "actions" must be a list of objects with a name')
    lines = ["# Functions", "", INSTRUCTION]
    for one in listed:
        known_fields(one, ("name", "description", "parameters"))
        description, parameters = one.get("description", ""), one.get("parameters", {})
        if not isinstance(description, str) or not isinstance(parameters, dict):
            raise UserError(f'action {shown(one)}: "description" must be text and "parameters" an object')
        lines += ["", f"## {_name(one, part)}", *([description] if description else [])]
        lines.append(f"Parameters: {_json(parameters)}")
    return "\n".join(lines)


def _result(part: dict[str, Any], pictures: Pictures) -> str:
    known_fields(part, ("image", "video", "text", "fps"))
    given = [kind for kind in ("image", "video", "text") if kind in part]
    if len(given) != 1:
        raise UserError(f"message content part {shown(part)} must have one of image, video, text")
    return _text(part) if given == ["text"] else pictures.show(given[0])


def _name(owner: dict[str, Any], part: dict[str, Any]) -> str:
    name = owner.get("name")
    if not isinstance(name, str) or not name or name != name.strip() or "\n" in name:
        raise UserError(f'message content part {shown(part)}: "name" must be the name of a function, on one line')
    return name


def _text(part: dict[str, Any]) -> str:
    if not isinstance(part.get("text"), str):
        raise UserError(f'message content part {shown(part)}: "text" must be text')
    return str(part["text"])


def _scaled(value: Any, pictures: Pictures) -> Any:
    """Arguments with the boxes and points in them as coordinates."""
    if isinstance(value, list):
        return [_scaled(one, pictures) for one in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if isinstance(kind, str) and kind in LENGTHS and kind in value:
        known_fields(value, (kind, "of"))
        return pictures.coordinates(value)
    return {key: _scaled(one, pictures) for key, one in value.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
