"""Token ids → the text of each token, as far as a token by itself has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNFINISHED = "�"
# The most tokens that one character is spelt with; some emoji take several characters, each a piece.
_LONGEST_PIECE = 8


class Piece(NamedTuple):
    """The tokens that are `ids[start:stop]` and their text: one token, or those that only together are a character."""

    start: int
    stop: int
    text: str
    is_added: bool


class Speller:
    """Tells the texts of tokens. Only what is asked for is decoded, so long examples cost no more than what is shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)

    def spell(self, ids: Sequence[int], start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of `ids[start:stop]`; joined they are the text there.

        Each is decoded behind the one before it: many decoders drop the space before a first token.
        """
        before = max(0, start - 1)
        while start < stop:
            end = self._end_of_piece(ids, start, stop)
            yield Piece(start, end, self._text(ids, before, start, end), ids[start] in self._added)
            before, start = start, end

    def _end_of_piece(self, ids: Sequence[int], start: int, stop: int) -> int:
        """Return where the tokens from `start` make whole characters for the first time."""
        if ids[start] in self._added:
            return start + 1
        for end in range(start + 1, min(start + _LONGEST_PIECE, stop) + 1):
            if not self._decode(ids[start:end]).endswith(_UNFINISHED):
                return end
        return start + 1

    def _text(self, ids: Sequence[int], before: int, start: int, end: int) -> str:
        known = self._decode(ids[before:start])
        whole = self._decode(ids[before:end])
        if whole.startswith(known):
            return whole[len(known) :]
        # Bytes that are no character, which the decoder judges together with those before them.
        return "".join(self._backend.id_to_token(token) or _UNFINISHED for token in ids[start:end])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))
