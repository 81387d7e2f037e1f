"""One member of a JSON object changed in its text, so that all others stay as they were written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.model.files.checks import read_object

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


def write_member(path: Path, name: str, value: Any) -> None:
    """Put `value` in the place of a member of the object in a file; a new one stands last.

    Raises:
        ModelError: the file holds no JSON object.
    """
    read_object(path)
    text = path.read_bytes().decode("utf-8")
    path.write_bytes(set_member(text, name, value).encode("utf-8"))


def set_member(text: str, name: str, value: Any) -> str:
    """Return the text of a JSON object with `value`, on one line, in the place of a member; a new one stands last."""
    written = json.dumps(value, ensure_ascii=False)
    members = list(_members(text))
    # Of those that are there twice, readers take the last.
    for member in reversed(members):
        if member.name == name:
            return text[: member.begin] + written + text[member.stop :]
    new = f"{json.dumps(name)}: {written}"
    if not members:
        return f"{{\n  {new}\n}}" + text[text.index("}") + 1 :]
    gap = text[text.index("{") + 1 : members[0].start]
    return f"{text[: members[-1].stop]},{gap}{new}{text[members[-1].stop :]}"


class _Member(NamedTuple):
    """Where a member starts in the text, and where its value begins and stops."""

    name: str
    start: int
    begin: int
    stop: int


def _members(text: str) -> Iterator[_Member]:
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        name, behind = _DECODER.raw_decode(text, at)
        begin = _skip(text, _skip(text, behind) + 1)
        _, stop = _DECODER.raw_decode(text, begin)
        yield _Member(name, at, begin, stop)
        at = _skip(text, stop)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at
