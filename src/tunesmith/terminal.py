"""Terminals, pipes and locales that don't take every character: what is printed there, and UTF-8 for all the rest."""

from __future__ import annotations

import codecs
import io
import locale
import os
import sys

_ERRORS = "tunesmith_plain"
_PLAIN = {
    "…": "...",
    "→": "->",
    "←": "<-",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "·": ".",
    "•": "*",
    "±": "+/-",
    "≤": "<=",
    "≥": ">=",
    "⟦": "[[",
    "⟧": "]]",
    "↵": "\\n",
    "─": "-",
    "━": "-",
    "│": "|",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "✓": "v",
}


def use_utf8() -> None:
    """Start this program anew in Python's UTF-8 mode if the locale has another encoding; else do nothing.

    There, names of files from a YAML file couldn't be looked up, and libraries would write files in that encoding.
    Processes that this one starts inherit the mode. What is printed keeps the encoding of the terminal.
    """
    encodings = {sys.getfilesystemencoding(), locale.getpreferredencoding(False)}
    if (
        sys.flags.utf8_mode
        or not sys.executable
        or {it.lower().replace("-", "") for it in encodings} == {"utf8"}
    ):
        return
    environ = {**os.environ, "PYTHONUTF8": "1"}
    environ.setdefault(
        "PYTHONIOENCODING", f"{getattr(sys.stdout, 'encoding', None) or 'ascii'}:backslashreplace"
    )
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def print_in_any_encoding() -> None:
    """Let stdout and stderr print something plain for each character that their encoding lacks."""
    codecs.register_error(_ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def write_plainly(text: str, encoding: str) -> str:
    """Return the text with something plain for each character that an encoding lacks."""
    codecs.register_error(_ERRORS, _replace)
    return text.encode(encoding, errors=_ERRORS).decode(encoding)


def print_data(text: str) -> None:
    """Print, to stdout, what another program reads: in UTF-8 wherever it goes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    number = ord(character)
    if 0x2500 <= number < 0x2580:  # lines of tables
        return "+"
    if 0x2580 <= number < 0x25A0 or 0x2800 <= number < 0x2900:  # bars, and dots of curves
        return "#"
    return character.encode("ascii", "backslashreplace").decode()
