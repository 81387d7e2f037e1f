"""Rows from JSONL, JSON, CSV and Parquet files. Each reader streams, and names the place of what is malformed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.data.arrow_rows import Row, iterate_rows
from tunesmith.data.json_text import ROW_DECODER, RefusedJSONError
from tunesmith.errors import DataError

Rows = Iterator[tuple[str, Row]]

BATCH_ROWS = 1000
_CHUNK_CHARS = 1 << 20
# An object that hasn't ended after this many characters is taken as malformed, not as long.
_LONGEST_OBJECT_CHARS = 1 << 26
# Files about a data set, which lie beside its rows.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "split.json"}


def list_files(path: Path, split: str) -> list[Path]:
    known = ", ".join(sorted(READERS))
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"`{path}` has an unknown suffix", f"known are {known}")
        return [path]
    for folder in (path, path / "data"):
        files = sorted(
            file
            for file in folder.glob("*")
            if file.is_file() and file.suffix.lower() in READERS and not _is_beside_rows(file)
        )
        if files:
            break
    else:
        raise DataError(f"the folder `{path}` holds no file of rows", f"known suffixes are {known}")
    of_split = [file for file in files if file.name.startswith(split)]
    if not of_split and split != "train":
        names = ", ".join(f"`{file.name}`" for file in files[:8])
        raise DataError(
            f"the folder `{path}` has no file of split `{split}`",
            f"a split's files begin with its name; the files are {names}",
        )
    return of_split or files


def _is_beside_rows(file: Path) -> bool:
    return file.name.startswith(".") or file.name in _NOT_ROWS


@contextmanager
def open_rows(file: Path) -> Iterator[BinaryIO]:
    """Open `file`; what the operating system says about it becomes a DataError."""
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise DataError(
            f"can't read `{file}`: {error.strerror or error}", "check the file and its permissions"
        ) from error


def _decoded_lines(file: Path) -> Iterator[str]:
    # Read as bytes, so that only a newline ends a line and an encoding error knows its line.
    with open_rows(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"`{file}`, line {number} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}",
                    "convert the file to UTF-8, as with `iconv -f LATIN1 -t UTF-8`",
                ) from error


def _read_json(file: Path) -> Rows:
    first = next((line.lstrip() for line in _decoded_lines(file) if line.strip()), "")
    return _read_json_array(file) if first.startswith("[") else _read_jsonl(file)


def _read_jsonl(file: Path) -> Rows:
    for number, line in enumerate(_decoded_lines(file), start=1):
        if line.isspace():
            continue
        where = f"`{file}`, line {number}"
        try:
            row = ROW_DECODER.decode(line)
        except RefusedJSONError as error:
            raise DataError(f"{where} {error}", error.hint) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{where} is not valid JSON: {error}", "each line must be one JSON object"
            ) from error
        yield where, _check_object(row, where)


def _check_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is a {type(row).__name__}, not an object", "each row must be one JSON object"
        )
    return row


def _read_json_array(file: Path) -> Rows:
    reader = _ArrayText(file)
    reader.expect("[")
    count = 0
    while reader.peek() != "]":
        if count:
            reader.expect(",")
        count += 1
        reader.peek()
        where = f"`{file}`, item {count} (line {reader.line})"
        yield where, _check_object(reader.decode(where), where)
    reader.expect("]")
    if rest := reader.peek():
        raise DataError(f"`{file}`, line {reader.line}: `{rest}` after the end of the array", "remove it")


class _ArrayText:
    """The text of a JSON array, read in chunks as the parser asks for it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.line = 1
        self._lines = _decoded_lines(file)
        self._text = ""
        self._at = 0

    def _extend(self) -> bool:
        parts, size = [self._text[self._at :]], 0
        for line in self._lines:
            parts.append(line)
            size += len(line)
            if size >= _CHUNK_CHARS:
                break
        self._text, self._at = "".join(parts), 0
        return size > 0

    def _skip(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """Return the next character that isn't white space, "" at the end of the file."""
        while True:
            match = re.compile(r"\s*").match(self._text, self._at)
            assert match is not None
            self._skip(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._extend():
                return ""

    def expect(self, character: str) -> None:
        """Step over `character`, after white space."""
        if (found := self.peek()) != character:
            got = f"`{found}`" if found else "the end of the file"
            raise DataError(
                f"`{self.file}`, line {self.line}: `{character}` expected, {got} found",
                "the file must be one JSON array of objects, or one JSON object a line",
            )
        self._skip(self._at + 1)

    def decode(self, where: str) -> Any:
        """Return the next JSON value."""
        while True:
            try:
                value, end = ROW_DECODER.raw_decode(self._text, self._at)
            except RefusedJSONError as error:
                raise DataError(f"{where} {error}", error.hint) from error
            except (json.JSONDecodeError, RecursionError) as error:
                # The value may go on after this chunk.
                if len(self._text) - self._at < _LONGEST_OBJECT_CHARS and self._extend():
                    continue
                raise DataError(
                    f"{where} is not valid JSON: {error}", "mend the file at this item"
                ) from error
            self._skip(end)
            return value


def _read_csv(file: Path) -> Rows:
    # The library's limit of 128 KiB a field is shorter than a long document.
    csv.field_size_limit(_LONGEST_OBJECT_CHARS)
    reader = csv.reader(_decoded_lines(file), strict=True)
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
            header = _check_header(fields, where)
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{where} has {len(fields)} fields, and the header has {len(header)}",
                "put fields that hold commas or newlines in double quotes",
            )
        yield where, dict(zip(header, fields, strict=True))


def _check_header(names: list[str], where: str) -> list[str]:
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{where} is separated by `;`", "write the file with commas between its fields")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{where} names the column `{twice[0]}` twice", "give each column a name of its own")
    return names


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    count = 0
    try:
        with open_rows(file) as stream, parquet.ParquetFile(stream) as reader:
            for batch in reader.iter_batches(BATCH_ROWS):
                for row in iterate_rows(batch):
                    count += 1
                    yield f"`{file}`, row {count}", row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"`{file}` is not a valid Parquet file: {str(error).splitlines()[0]}", "write the file again"
        ) from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
