"""The text of a file, in lines or in chunks; what can't be decoded is told with its line."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.content import encoding_of
from tunesmith.data.packed import open_unpacked
from tunesmith.errors import DataError

_CHUNK_BYTES = 1 << 20


def decoded_lines(file: Path) -> Iterator[str]:
    """Yield the lines with their ends; only a newline ends a line.

    Raises:
        DataError: the file can't be read, or isn't the text that it seems to be.
    """
    with open_unpacked(file) as stream:
        encoding = encoding_of(stream.peek(4))
        if encoding not in (None, "utf-8-sig"):
            assert encoding is not None
            yield from _other_lines(file, stream, encoding)
            return
        # Read as bytes, so that an encoding error knows its line.
        has_other = False
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, number, line, error.start, error.reason, has_other) from error
            has_other = has_other or not text.isascii()
            yield text


def decoded_chunks(file: Path) -> Iterator[str]:
    """Yield the text in pieces of about a megabyte, wherever lines end.

    Raises:
        DataError: as `decoded_lines` does.
    """
    with open_unpacked(file) as stream:
        encoding = encoding_of(stream.peek(4)) or "utf-8"
        decoder = codecs.getincrementaldecoder(encoding)()
        number, has_other, is_end = 1, False, False
        while not is_end:
            data = stream.read(_CHUNK_BYTES)
            is_end = not data
            try:
                text = decoder.decode(data, is_end)
            except UnicodeDecodeError as error:
                if not encoding.startswith("utf-8"):
                    raise _not_decoded(file, number, encoding, error) from error
                number += error.object.count(b"\n", 0, error.start)
                begin = error.object.rfind(b"\n", 0, error.start) + 1
                line = error.object[begin:].split(b"\n", 1)[0]
                has_other = has_other or not error.object[:begin].isascii()
                raise _not_utf8(file, number, line, error.start - begin, error.reason, has_other) from error
            number += text.count("\n")
            has_other = has_other or not text.isascii()
            yield text


def _other_lines(file: Path, stream: io.BufferedReader, encoding: str) -> Iterator[str]:
    number = 0
    try:
        for line in io.TextIOWrapper(stream, encoding, newline="\n"):
            number += 1
            yield line
    except UnicodeDecodeError as error:
        raise _not_decoded(file, number + 1, encoding, error) from error


def _not_decoded(file: Path, number: int, encoding: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"`{file}` begins as {encoding.upper()}, and isn't from line {number} on: {error.reason}",
        "fetch or write the file again, in UTF-8",
    )


def _not_utf8(file: Path, number: int, line: bytes, at: int, reason: str, has_other: bool) -> DataError:
    """Return the error for the byte `at` in a line; `has_other`: lines before hold other characters than ASCII."""
    where = f"`{file}`, line {number}"
    pair = line[at : at + 2]
    if pair[:1] == b"\xed" and pair[1:] >= b"\xa0":
        return DataError(
            f"{where} is CESU-8, not UTF-8: at column {at + 1} it writes a character in two halves",
            "convert the file: `uconv -f CESU-8 -t UTF-8`, or write it again as UTF-8",
        )
    message = f"{where} is not UTF-8: byte 0x{line[at]:02x} at column {at + 1}"
    if reason == "unexpected end of data":
        return DataError(message, "the file seems to be cut there: fetch it again")
    if has_other or not line[:at].isascii():
        return DataError(message, "the text before it is UTF-8: mend this place, or fetch the file again")
    return DataError(
        message,
        "convert the file to UTF-8 from the encoding that it was written in: `iconv -f ENCODING -t UTF-8` "
        "(Windows in Western Europe writes WINDOWS-1252)",
    )
