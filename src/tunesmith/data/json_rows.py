"""Rows from JSON: an object a line, an array of them, or the lists that one object holds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.arrow_rows import Row, Rows
from tunesmith.data.json_document import JsonDocument, describe_error
from tunesmith.data.json_holder import choose_list, look_at_first
from tunesmith.data.json_text import ROW_DECODER, RefusedJSONError
from tunesmith.data.text_file import decoded_lines
from tunesmith.errors import DataError

_BETWEEN = re.compile(r"\s*,?\s*")
_ONE_OBJECT = 'each row must be one JSON object, as {"text": "…"}'


def read_json(file: Path, split: str) -> Rows:
    """Yield the rows of a file; of one object that holds a list for each split, those of `split`.

    Raises:
        DataError: the file is malformed, or where its rows are is in doubt.
    """
    document = JsonDocument(file)
    first = document.peek()
    if first == "[":
        yield from _number(file, document, document.items())
        if rest := document.peek():
            hint = "remove it"
            if rest == "[":
                hint = f"it begins another array; make one of both: jq -s add {shlex.quote(file.name)} > one.json"
            raise DataError(f"`{file}`, line {document.line}: `{rest}` after the end of the array", hint)
        return
    if first != "{":
        yield from _read_lines(file)
        return
    found = look_at_first(file)
    if found.is_alone and (key := choose_list(found, file, split)) is not None:
        yield from _number(file, document, document.items_under(key), f" of `{key}`")
    elif found.ends_its_line:
        yield from _read_lines(file)
    else:
        yield from _number(file, document, document.values())


def find_holder(file: Path, split: str) -> str | None:
    """Return the key under which the rows of a file lie; None if they are the file's own values.

    Raises:
        DataError: as `read_json` does.
    """
    if JsonDocument(file).peek() != "{":
        return None
    found = look_at_first(file)
    return choose_list(found, file, split) if found.is_alone else None


def _number(file: Path, document: JsonDocument, values: Iterator[Any], of: str = "") -> Rows:
    for count, value in enumerate(values, start=1):
        where = f"`{file}`, item {count}{of} (line {document.begin})"
        yield where, _check_object(value, where)


def _read_lines(file: Path) -> Rows:
    for number, line in enumerate(decoded_lines(file), start=1):
        if line.isspace():
            continue
        where = f"`{file}`, line {number}"
        try:
            values = _values_of(line)
        except (RefusedJSONError, json.JSONDecodeError, RecursionError) as error:
            raise describe_error(where, error, _hint_for(line)) from error
        for value in values:
            yield where, _check_object(value, where)


def _values_of(line: str) -> list[Any]:
    try:
        return [ROW_DECODER.decode(line)]
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
    # Several objects, or one with a comma after it.
    values, at = [], 0
    while (at := _end_of(_BETWEEN, line, at)) < len(line):
        value, at = ROW_DECODER.raw_decode(line, at)
        values.append(value)
    return values


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None
    return match.end()


def _hint_for(line: str) -> str:
    line = line.lstrip()
    if line.startswith("{'"):
        return "JSON has double quotes: write the rows with json.dumps, not as Python shows them"
    if "," in line and line[0] not in "{[":
        return "the file looks like CSV: name it .csv"
    return "each line must be one JSON object"


def _check_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object", _ONE_OBJECT)
    return value
