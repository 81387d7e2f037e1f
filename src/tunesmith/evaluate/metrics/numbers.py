"""The number that an answer comes to: behind `####`, in a box, or the last one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_MARKER = "####"
_MOST_DIGITS = 400  # Python reads no whole number of more than 4,300
_SIGN = r"[+\-−–]"
_CURRENCY = r"[$€£¥₹]"
# 1,234,567.5 · 1.234.567,5 · 1 234 567 (narrow and other hard spaces too) · 1'234.5 · 12.5 · 3,5 · .5
_DIGITS = (
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+|"
    r"\d{1,3}(?:['’\u00a0\u2009\u202f ]\d{3})+(?:[.,]\d+)?|\d+(?:[.,]\d+)?|\.\d+"
)
_NUMBER = (
    rf"(?P<sign>(?:{_SIGN}\s?)?)(?:\\?{_CURRENCY}\s?)?(?P<inner>{_SIGN}?)(?P<digits>{_DIGITS})"
    r"(?P<power>[eE][+\-]?\d{1,3}(?!\w|\.\d))?(?:\s?/\s?(?P<below>\d+))?"
)
# Not within a word, a longer number or a version: A1, 3.4.5; a sign behind a digit or a bracket is an operator.
_ANYWHERE = re.compile(rf"(?<![^\W_])(?<![.,]){_NUMBER}(?!\d)")
_AFTER_MARKER = re.compile(rf"\s*{_NUMBER}(?!\.?\d)")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_BOX = re.compile(r"\\?\b(?:boxed|fbox)\s*\{")
# A whole reference that is a number with no more than a unit: $1,234.50, 25 %, 72 apples, -3 km/h, ≈ 3.
_ALONE = re.compile(
    rf"\W{{0,3}}(?:[A-Za-z]\w{{0,8}}\s*=\s*)?{_NUMBER}\s*(?:[%‰°]\s?\w?|[^\W\d_][^\s\d]{{0,14}})?\s*[.!]?\W{{0,3}}"
)
_CONCLUDES = re.compile(
    rf"(?is).*\b(?:answer|result|total|solution)\s*(?:is|are|=|:)\s*(?:approximately |about )?"
    rf"{_NUMBER}\s*(?:[%‰°]|[^\W\d_]{{1,14}})?\s*[.!]?\W{{0,3}}"
)


def is_numeric(reference: str) -> bool:
    """Tell whether a reference is one by its form: a marker or a box with a number, a number alone, or "the answer is 72"."""
    if _marked_line(reference) is not None or _BOX.search(reference):
        return find_marked(reference) is not None
    text = _without_latex(reference).strip()
    has_form = _ALONE.fullmatch(text) or _CONCLUDES.fullmatch(text[-2000:])
    return has_form is not None and reference_number(reference) is not None


def find_marked(reference: str) -> Fraction | None:
    """Return the number that a reference marks as its answer: behind the last `####`, where nothing follows it, or in the last box."""
    answer = _marked_line(reference)
    if answer is None:
        return _boxed(reference)
    match = _AFTER_MARKER.match(answer)
    is_whole = match is not None and answer[match.end() :].strip() in ("", ".")
    return _value(match, signed=True) if match is not None and is_whole else None


def _marked_line(reference: str) -> str | None:
    """Return what stands behind the last `####`; None without one, or where that is a heading of Markdown."""
    _, marker, answer = reference.rpartition(_MARKER)
    return _without_latex(answer) if marker and "\n" not in answer.strip() else None


def reference_number(reference: str) -> Fraction | None:
    """Return the number to compare with: the marked one, or else the last; None if there is none."""
    if _marked_line(reference) is not None:
        return find_marked(reference)
    boxed = _boxed(reference)
    return boxed if boxed is not None else _last_number(reference)


def match_numbers(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
    """Return 1 for an answer that comes to its reference's number, else 0; None where the reference has none."""
    scores: list[float | None] = []
    for text, reference in zip(predictions, references, strict=True):
        number = reference_number(reference)
        is_marked = _marked_line(reference) is not None
        said = _behind_marker(text) if is_marked else _answer_number(text)
        scores.append(None if number is None else float(said == number))
    return scores


def _behind_marker(text: str, alone: bool = False) -> Fraction | None:
    # The first: a model that runs on asks and answers questions of its own. What follows the number doesn't
    # count against it: "#### 72 dollars" says 72.
    _, marker, answer = text.partition(_MARKER)
    answer = _without_latex(answer)
    match = _AFTER_MARKER.match(answer) if marker else None
    if match is None or (alone and answer[match.end() :].partition("\n")[0].strip() not in ("", ".")):
        return None
    return _value(match, signed=True)


def _answer_number(text: str) -> Fraction | None:
    # Where no marker is asked for, one may begin a heading: "#### 1. Add".
    for found in (_behind_marker(text, alone=True), _boxed(text)):
        if found is not None:
            return found
    return _last_number(text)


def _boxed(text: str) -> Fraction | None:
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    depth, begin = 1, boxes[-1].end()
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return _last_number(text[begin:end])
    return None


def _last_number(text: str) -> Fraction | None:
    text = _without_latex(text)
    for match in reversed([*_ANYWHERE.finditer(text)]):
        value = _value(match, _is_signed(match, text))
        if value is not None:
            return value
    return None


def _is_signed(match: re.Match[str], text: str) -> bool:
    """Tell whether a number's sign is one: not that of a subtraction, a dash or a list."""
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].rstrip()
    if match["sign"][-1:].isspace() and (not line or line[-1].isalpha()):
        return False
    return not (line[-1:].isdigit() or line[-1:] in tuple(")]}%"))


def _value(match: re.Match[str], signed: bool) -> Fraction | None:
    digits = re.sub("['’\u00a0\u2009\u202f ]", "", match["digits"])
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    elif re.fullmatch(r"\d{1,3}(\.\d{3}){2,}(,\d+)?|\d{1,3}(\.\d{3})+,\d+", digits):
        digits = digits.replace(".", "").replace(",", ".")
    if len(digits) + len(match["below"] or "") > _MOST_DIGITS:
        return None
    value = Fraction(digits.replace(",", ".") + (match["power"] or ""))
    if match["below"] is not None:
        if not int(match["below"]):
            return None
        value /= int(match["below"])
    signs = (match["sign"] if signed else "") + match["inner"]
    return -value if any(sign in signs for sign in "-−–") else value


def _without_latex(text: str) -> str:
    for written, plain in (("{,}", ","), ("\\,", ""), ("\\%", "%"), ("\\!", "")):
        text = text.replace(written, plain)
    return _FRACTION.sub(r"\1/\2", text)
