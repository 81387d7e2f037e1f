"""JSON as rows are written in it: a number keeps its text, and what would be lost in silence is refused."""

from __future__ import annotations

import json
import math
from typing import Any

# What Python turns into a number without being told that it is meant (CVE-2020-10735).
_MOST_DIGITS = 4300


class RefusedJSONError(ValueError):
    """Valid JSON of which a part would be lost; its text goes on from the row's name."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class WrittenFloat(float):
    """A number with a fraction or an exponent, which as text is what was written: `1.50`."""

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        if math.isinf(number):
            raise RefusedJSONError(
                f"holds the number {text}, which is too large", "put it in quotes to make it text"
            )
        number._text = text
        return number

    _text: str

    def __str__(self) -> str:
        return self._text


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise RefusedJSONError(
            f"holds a whole number of {len(text.lstrip('-')):,} digits", "put it in quotes to make it text"
        )
    return int(text)


def _constant(text: str) -> float:
    if text != "NaN":
        raise RefusedJSONError(f"holds {text}, which is no number", "leave it out, or put it in quotes")
    return math.nan


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedJSONError(f"has the key `{twice}` twice in one object", "keep the one that is meant")
    return made


ROW_DECODER = json.JSONDecoder(
    parse_float=WrittenFloat, parse_int=_whole_number, parse_constant=_constant, object_pairs_hook=_object
)
