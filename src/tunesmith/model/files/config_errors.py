"""Why no model can be made of a `config.json`: which field it is, and what it must be."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tunesmith.errors import ModelError

_HINT = "mend the file, or download the model again"
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "an object",
    "list": "a list",
}


def explain_config(
    path: str, error: Exception, content: dict[str, Any], build: Callable[[dict[str, Any]], object]
) -> ModelError:
    """Return the error for a `config.json`, with this content, that transformers couldn't make a model of.

    `path` is what to call the file. `build` is what has failed, for another content.
    """
    reason = " ".join(str(error.__cause__ or error).split())
    if not type(error).__module__.startswith("huggingface_hub"):
        reason = f"{type(error).__name__}: {reason}"
    # huggingface_hub's error tells the field's name, not which of the nested configs it is in.
    named = re.search(r"error for field '([^']+)'", str(error))
    found = _named_field(content, named[1], reason) if named else _find_culprit(content, build)
    if found is None:
        return ModelError(f"no model can be made of `{path}`: {reason}", _HINT)
    place, value = found
    wanted = re.search(r"expected (a )?(\w+), got", reason) if named else None
    told = f"it must be {_TYPES.get(wanted[2], wanted[2])}" if wanted else reason
    return ModelError(f"`{path}`: `{place}` is `{json.dumps(value)}`: {told}", _HINT)


def _named_field(content: dict[str, Any], name: str, reason: str) -> tuple[str, Any] | None:
    fields = [(keys, value) for keys, value in _fields_of(content) if keys[-1] == name]
    meant = [field for field in fields if repr(field[1]) in reason] or fields
    return (".".join(meant[0][0]), meant[0][1]) if meant else None


def _find_culprit(
    content: dict[str, Any], build: Callable[[dict[str, Any]], object]
) -> tuple[str, Any] | None:
    """Return the field that keeps a model from being made; None if it isn't a single one.

    It is a number that was written as text, or else one without which, at its default that is, a model can be made.
    """
    if _can_be_built(content, build):  # what has failed was something else
        return None
    fields = [(keys, value) for keys, value in _fields_of(content) if keys != ("model_type",)]
    for keys, value in fields:
        number = _number_in(value)
        if number is not None and _can_be_built(_changed(content, keys, number), build):
            return ".".join(keys), value
    for keys, value in fields:
        if _can_be_built(_changed(content, keys, None), build):
            return ".".join(keys), value
    return None


def _can_be_built(content: dict[str, Any], build: Callable[[dict[str, Any]], object]) -> bool:
    try:
        build(content)
    except Exception:  # any of those that a bad value leads to
        return False
    return True


def _changed(content: dict[str, Any], keys: tuple[str, ...], number: float | None) -> dict[str, Any]:
    """Return the content with another value of one field, or without the field."""
    changed = copy.deepcopy(content)
    inside = changed
    for key in keys[:-1]:
        inside = inside[key]
    if number is None:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = number
    return changed


def _number_in(value: Any) -> float | None:
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _fields_of(content: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every field by its keys, those of nested objects before the object itself."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from (((name, *keys), inner) for keys, inner in _fields_of(value))
        yield (name,), value
