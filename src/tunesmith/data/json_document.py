"""JSON that isn't one object a line: values are parsed one by one, from text that is read as they need it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.json_text import ROW_DECODER, RefusedJSONError
from tunesmith.data.text_file import decoded_chunks
from tunesmith.errors import DataError

# A value that hasn't ended after this many characters is taken as malformed, not as long.
_LONGEST_VALUE_CHARS = 1 << 26
_BLANKS = re.compile(r"\s*")


class JsonDocument:
    """The text of a file, read in chunks as the parser asks for it.

    `line` is where the parser is, `begin` where the value that it gave last begins; both count from 1.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.line = 1
        self.begin = 1
        self._chunks = decoded_chunks(file)
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Return the next character that isn't white space, "" at the end of the file."""
        while True:
            match = _BLANKS.match(self._text, self._at)
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
        self._at += 1

    def decode(self, name: str) -> Any:
        """Return the next value; `name` is what errors call it."""
        self.peek()
        self.begin = self.line
        while True:
            at = self._at
            try:
                value, end = ROW_DECODER.raw_decode(self._text, at)
            except (RefusedJSONError, json.JSONDecodeError, RecursionError) as error:
                # The value may go on after this chunk.
                is_torn = isinstance(error, json.JSONDecodeError)
                if is_torn and len(self._text) - at < _LONGEST_VALUE_CHARS and self._extend():
                    continue
                where = f"`{self.file}`, {name} (line {self.line})"
                raise describe_error(where, error, "mend the file at this place", self.line, at) from error
            if end == len(self._text) and self._extend():
                continue  # a number may go on
            self._skip(end)
            return value

    def values(self) -> Iterator[Any]:
        """Yield the values that follow one another, with a comma between or without."""
        count = 0
        while character := self.peek():
            if count and character == ",":
                self.expect(",")
                if not self.peek():
                    return
            count += 1
            yield self.decode(f"item {count}")

    def items(self) -> Iterator[Any]:
        """Yield the items of the array that comes next."""
        self.expect("[")
        count = 0
        while self.peek() != "]":
            if count:
                self.expect(",")
            count += 1
            yield self.decode(f"item {count}")
        self.expect("]")

    def walk_keys(self) -> Iterator[str]:
        """Yield the keys of the object that comes next; whoever asks takes each key's value before the next."""
        self.expect("{")
        count = 0
        while self.peek() != "}":
            if count:
                self.expect(",")
            if self.peek() != '"':
                self.expect('"')
            count += 1
            key = self.decode(f"key {count}")
            self.expect(":")
            yield key
        self.expect("}")

    def items_under(self, wanted: str) -> Iterator[Any]:
        """Yield the items of the array under one key of the object that comes next."""
        for key in self.walk_keys():
            is_list = self.peek() == "["
            if key == wanted:
                yield from self.items()
            elif is_list:
                for _ in self.items():
                    pass
            else:
                self.decode(f"`{key}`")

    def _extend(self) -> bool:
        parts = [self._text[self._at :]]
        # As much again as there is, so that a long value isn't parsed over and over.
        missing = max(1, len(parts[0]))
        for chunk in self._chunks:
            parts.append(chunk)
            missing -= len(chunk)
            if missing <= 0:
                break
        self._text, self._at = "".join(parts), 0
        return len(self._text) > len(parts[0])

    def _skip(self, end: int) -> None:
        if end == self._at:
            return
        self.line += self._text.count("\n", self._at, end)
        self._at = end


def describe_error(
    where: str, error: Exception, hint: str, first_line: int | None = None, begin: int = 0
) -> DataError:
    """Return the error for a value at `where` that can't be parsed.

    `first_line` is the line of the text's character `begin`; without it, the text is one line.
    """
    if isinstance(error, RefusedJSONError):
        return DataError(f"{where} {error}", error.hint)
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"{where} is not valid JSON: {error}", hint)
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return DataError(f"{where} is not valid JSON: it ends before the value does", hint)
    place = f"at character {error.pos + 1}"
    if first_line is not None:
        place = f"in line {first_line + error.doc.count(chr(10), begin, error.pos)}"
    return DataError(f"{where} is not valid JSON: {error.msg} {place}", hint)
