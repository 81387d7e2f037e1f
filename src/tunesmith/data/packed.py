"""Files as bytes, packed ones unpacked while they are read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.errors import DataError

# What a packed file begins with, and the suffix by which such files go.
_BEGINNINGS = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED_SUFFIXES = frozenset(_BEGINNINGS.values())


@contextmanager
def open_file(file: Path) -> Iterator[io.BufferedReader]:
    """Open `file` as it lies on disk; what the operating system says about it becomes a DataError."""
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        # Without a number, it is what a library says about the content.
        is_damaged = error.errno is None
        hint = (
            "it is damaged: fetch or write it again" if is_damaged else "check the file and its permissions"
        )
        raise DataError(f"can't read `{file}`: {error.strerror or error}", hint) from error


@contextmanager
def open_unpacked(file: Path) -> Iterator[io.BufferedReader]:
    """Open `file`, unpacked if its content is packed, whatever it is called.

    Raises:
        DataError: it can't be read, or what is packed is damaged.
    """
    with open_file(file) as stream:
        suffix = _packing_of(stream)
        if suffix is None:
            yield stream
            return
        try:
            yield _unpack(stream, suffix)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise DataError(
                f"`{file}` is packed as {suffix}, and damaged: {error}", "fetch or pack the file again"
            ) from error


def is_packed(file: Path) -> bool:
    """Tell whether the content of `file` is packed."""
    with open_file(file) as stream:
        return _packing_of(stream) is not None


def _packing_of(stream: io.BufferedReader) -> str | None:
    head = stream.peek(8)
    return next((suffix for begin, suffix in _BEGINNINGS.items() if head.startswith(begin)), None)


def _unpack(stream: io.BufferedReader, suffix: str) -> io.BufferedReader:
    if suffix in _OPENERS:
        return io.BufferedReader(_OPENERS[suffix](stream))
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))
