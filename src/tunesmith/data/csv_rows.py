"""Rows from CSV files, and from those whose fields are separated by tabs."""

from __future__ import annotations

import csv
import re
from itertools import chain
from pathlib import Path

from tunesmith.data.arrow_rows import Rows
from tunesmith.data.content import suffix_of
from tunesmith.data.text_file import decoded_lines
from tunesmith.errors import DataError

_LONGEST_FIELD_CHARS = 1 << 26
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
_SEPARATORS = {";": "`;`", "\t": "tabs", "|": "`|`", ",": "commas"}


def read_csv(file: Path) -> Rows:
    """Yield the rows; every value is text, as it is written.

    Raises:
        DataError: the file is malformed, or line 1 is no header.
    """
    # The library's limit of 128 KiB a field is shorter than a long document.
    csv.field_size_limit(_LONGEST_FIELD_CHARS)
    separator = "\t" if suffix_of(file) == ".tsv" else ","
    lines = decoded_lines(file)
    # Up to the header, which tells whether a blank follows each separator.
    head = [next(lines, "")]
    while head[-1].isspace():
        head.append(next(lines, ""))
    is_spaced = f"{separator} " in head[-1] and not re.search(rf"{separator}[^ ]", head[-1])
    reader = csv.reader(chain(head, lines), strict=True, delimiter=separator, skipinitialspace=is_spaced)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"`{file}`, line {line}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where} is not valid CSV: {error}", "mend the file at this line") from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _check_header(fields, where, separator)
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{where} has {len(fields)} fields, and the header has {len(header)}",
                "put fields that hold commas or newlines in double quotes",
            )
        yield where, dict(zip(header, fields, strict=True))


def _check_header(names: list[str], where: str, separator: str) -> list[str]:
    """Return the names without blanks around them.

    Raises:
        DataError: they aren't names, or not separated as the file's suffix says.
    """
    names = [name.strip() for name in names]
    for other in _SEPARATORS.keys() - {separator}:
        if len(names) == 1 and other in names[0]:
            named = (
                "name it .tsv"
                if other == "\t"
                else f"write the file with {_SEPARATORS[separator]} between its fields"
            )
            raise DataError(f"{where} is separated by {_SEPARATORS[other]}", named)
    if _is_row(names):
        raise DataError(
            f"{where} seems to be a row, not a header: {', '.join(f'`{name[:40]}`' for name in names[:4])}",
            "if it is a row, put a first line with the columns' names before it, as `question,answer`; if it is the "
            "header, rename its columns to words",
        )
    if names.count("") > 1:
        places = ", ".join(str(place) for place, name in enumerate(names, start=1) if not name)
        raise DataError(
            f"{where} leaves columns {places} without a name",
            "delete the empty columns (spreadsheets write them after the last one in use), or name them",
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"{where} names the column `{twice[0]}` twice",
            "give each column a name of its own; without a header, put one before it",
        )
    return names


def _is_row(names: list[str]) -> bool:
    """Tell whether these are values: one is a number, and all others are numbers or sentences.

    Sentences alone may be the questions of a form, whose export has them as its header.
    """
    numbers = [name for name in names if _NUMBER.fullmatch(name)]
    return bool(numbers) and all(name in numbers or name.endswith((".", "?", "!")) for name in names)
