"""One JSON object that holds the rows of a file: a list of them under a key, or one for each split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.content import suffix_of
from tunesmith.data.json_document import JsonDocument
from tunesmith.data.split_names import split_of_name, standard_split
from tunesmith.errors import DataError

Held = Literal["rows", "empty", "messages", "column", "object", "value"]

# What a message has that a row hasn't.
_MESSAGE_KEYS = {"role", "from", "speaker", "author", "sender"}
# Keys that hold rows beside others that tell about them; `choices` beside `question` is a part of one row.
_HOLDERS = {"data", "dataset", "rows", "items", "examples", "instances", "records", "samples", "entries"}
# What makes a row of an object, whose `examples` or `items` are then a part of it.
_COLUMNS_OF_ROWS = ({"instruction", "output"}, {"prompt", "completion"}, {"text"})


@dataclass(frozen=True)
class FirstObject:
    """The first object of a file: what each key holds, and how it lies in the file.

    `is_alone`: nothing comes after it. `ends_its_line`: it lies on one line, with nothing else on it.
    """

    held: dict[str, Held]
    is_alone: bool
    ends_its_line: bool


def look_at_first(file: Path) -> FirstObject:
    """Look at the object that a file begins with; lists in it are read item by item, and not kept.

    Raises:
        DataError: it goes over several lines, and is malformed.
    """
    document = JsonDocument(file)
    document.peek()
    begin = document.line
    held: dict[str, Held] = {}
    try:
        for key in document.walk_keys():
            held[key] = _look_at_value(document, key)
    except DataError:
        if document.line > begin:
            raise
        return FirstObject({}, is_alone=False, ends_its_line=True)  # told by whoever reads the line
    end = document.line
    is_alone = document.peek() == ""
    return FirstObject(held, is_alone, begin == end and (is_alone or document.line > end))


def _look_at_value(document: JsonDocument, key: str) -> Held:
    if document.peek() != "[":
        value = document.decode(f"`{key}`")
        if not isinstance(value, dict) or not value:
            return "value"
        # So pandas writes a column.
        return "column" if all(name.isdigit() for name in value) else _kind_of_object(value, "object")
    kinds = {_kind_of_object(it, "rows") if isinstance(it, dict) else "column" for it in document.items()}
    if len(kinds) < 2:
        return kinds.pop() if kinds else "empty"
    return "messages" if "messages" in kinds else "column"


def _kind_of_object(value: dict[str, Any], otherwise: Held) -> Held:
    return "messages" if _MESSAGE_KEYS & value.keys() else otherwise


def choose_list(found: FirstObject, file: Path, split: str) -> str | None:
    """Return the key whose list holds the rows of `split`; None if the object is a row itself.

    Raises:
        DataError: it holds rows, and which are meant is in doubt.
    """
    if "messages" in found.held.values():
        return None
    keys = [key for key, held in found.held.items() if held in ("rows", "empty")]
    of_split = {key: split_of_name(key) for key in keys}
    if keys and all(of_split.values()):
        if split in keys:
            return split
        meant = [key for key in keys if of_split[key] == standard_split(split)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise DataError(f"`{file}` holds several lists of split `{split}`", f"name one: {_listed(meant)}")
        raise DataError(f"`{file}` holds no split `{split}`", f"its splits are {_listed(keys)}")
    values = {key for key, held in found.held.items() if held == "value"}
    if any(columns <= values for columns in _COLUMNS_OF_ROWS):
        return None
    # One line of JSON lines is a row, unless it is called otherwise.
    is_a_line = found.ends_its_line and suffix_of(file) in (".jsonl", ".ndjson")
    keys = [
        key for key in keys if key in _HOLDERS or (not is_a_line and set(found.held.values()) == {"rows"})
    ]
    if len(keys) == 1:
        return keys[0]
    kinds = set(found.held.values())
    if kinds == {"rows"} and not is_a_line:
        raise DataError(
            f"the rows of `{file}` lie under one of {_listed(list(found.held))}",
            f"write those that are meant one a line: `jq -c '.NAME[]' {file.name} > rows.jsonl`",
        )
    if kinds == {"column"}:
        raise DataError(
            f"`{file}` holds columns, not rows: {_listed(list(found.held))}",
            "write an object for each row: pandas' to_json(…, orient='records', lines=True) does",
        )
    if kinds == {"object"} and len(found.held) > 1 and not is_a_line:
        raise DataError(
            f"the rows of `{file}` lie under keys of their own: {_listed(list(found.held))}",
            f"write them one a line: `jq -c '.[]' {file.name} > rows.jsonl`",
        )
    return None


def _listed(keys: list[str]) -> str:
    shown = ", ".join(f"`{key}`" for key in keys[:8])
    return shown if len(keys) <= 8 else f"{shown} and {len(keys) - 8:,} more"
