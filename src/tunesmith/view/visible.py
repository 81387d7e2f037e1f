"""Text of unknown origin, shown such that everything in it is seen and nothing of it acts."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from markupsafe import Markup

_ESCAPABLE = re.compile(r"[^ -~\n\t]")
# Drawn as nothing or as a blank, though Unicode files them under letters and marks (Default_Ignorable_Code_Point).
_UNSEEN = frozenset({0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0})
_SELECTORS = (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
# Controls, formats (bidirectional overrides, zero-width joiners), halves of pairs, private and unassigned ones, separators.
_UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
_MARKUP = {
    " ": "<b> </b>",
    "\n": '<b class="n">\n</b>',
    "\t": '<b class="t">\t</b>',
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&#34;",
    "'": "&#39;",
}
_MARKED = re.compile("[^!-%(-;=?-~]")


def escape_unseen(text: str) -> str:
    r"""Return the text with every character that isn't seen, or moves others, as `\x1b` or `\u202e`.

    Spaces, newlines and tabs stay.
    """
    return _ESCAPABLE.sub(lambda match: _spell(match[0]), text)


def shorten_middle(text: str, longest: int) -> str:
    """Return a text of about `longest` characters at most; what is left out of its middle is counted."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def mark_up(text: str) -> Markup:
    """Return the text as HTML: white space in elements of its own, to be given a glyph, and what isn't seen spelt out.

    A space is in `b`, a newline in `b.n`, a tab in `b.t`, and `u` holds what `escape_unseen` writes.
    """
    return Markup(_MARKED.sub(lambda match: _mark_up_character(match[0]), text))


@lru_cache(maxsize=8192)
def _mark_up_character(character: str) -> str:
    if character in _MARKUP:
        return _MARKUP[character]
    spelt = _spell(character)
    return character if spelt == character else f"<u>{spelt}</u>"


@lru_cache(maxsize=8192)
def _spell(character: str) -> str:
    code = ord(character)
    is_unseen = (
        unicodedata.category(character) in _UNSEEN_CATEGORIES
        or code in _UNSEEN
        or any(code in selectors for selectors in _SELECTORS)
    )
    if not is_unseen:
        return character
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
