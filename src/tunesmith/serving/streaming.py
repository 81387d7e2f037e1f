"""Tokens one by one → the text that they make together, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HALF = "\ufffd"  # what a part of a character decodes to


class TextStream:
    """Decodes an answer while it grows. A token may hold a part of a character, and begin with a blank or without."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens are decoded behind a few earlier ones, of which what is said already is taken off.
        self._start = self._said = 0

    def push(self, token: int) -> str:
        """Return the text that a token completes; "" where none is whole yet."""
        self._ids.append(token)
        before, text = self._decode(self._start, self._said), self._decode(self._start)
        if text.endswith(_HALF) or not text.startswith(before) or len(text) == len(before):
            return ""
        self._start, self._said = self._said, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is left at the end."""
        before, text = self._decode(self._start, self._said), self._decode(self._start)
        self._start, self._said = self._said, len(self._ids)
        return text[len(before) :] if text.startswith(before) else text

    def _decode(self, start: int, end: int | None = None) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))
