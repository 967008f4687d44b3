"""Fields of config.json and tokens of a tokenizer, as every family reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from tetrascope.errors import UserError

ConfigT = TypeVar("ConfigT")


def reads_config_json(read: Callable[[dict[str, Any]], ConfigT]) -> Callable[[dict[str, Any]], ConfigT]:
    """For a family's `from_hf`: values of a wrong type or form are a UserError, whoever stumbles over them.

    transformers' own checks raise errors of huggingface_hub; sections that are no objects, lists that are empty and
    the like raise Python's.
    """

    @functools.wraps(read)
    def checked(raw: dict[str, Any]) -> ConfigT:
        from huggingface_hub.errors import StrictDataclassError

        try:
            return read(raw)
        except UserError:
            raise
        except (StrictDataclassError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"config.json: {reason} ({type(error).__name__}); a value has a wrong type or form, correct it"
            ) from error

    return checked


def need(field: str, found: object, needed: object) -> None:
    """Raises UserError when an option of config.json has another value than the one that is available."""
    if found != needed:
        raise UserError(f"config.json: {field} is {found!r}; only {needed!r} is available")


def first_token(token: int | list[int] | None, default: int) -> int:
    """A token id of config.json, which may hold none or several: the published default, or the first."""
    if token is None:
        return default
    return token[0] if isinstance(token, list) else token


def special_token(tokenizer: Any, token: str, model: str = "the family", hint: str = "") -> int:
    """The id of a special token. Raises UserError when the tokenizer has none, naming who needs it."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise UserError(f"data.tokenizer: has no token {token}, which {model} needs; add it as a special token{hint}")
    return int(index)
