"""A text whose trained characters are known → token ids, and which of them are trained.

Labels come from where the tokens of one tokenization lie in the whole text. A token is trained if its
characters end after the prompt's end: one that spans prompt and completion is trained. The first token of
a segment never is, because nothing precedes it that could predict it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data.align import Aligned, Aligner, Span
from tunesmith.data.examples import Example, Segment
from tunesmith.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class MarkedText(NamedTuple):
    """The text of one segment; the characters in `spans` are trained. `ends`: the text has its own end token."""

    text: str
    spans: tuple[Span, ...]
    ends: bool


class RowError(DataError):
    """A DataError about the row at `index` of the batch."""

    def __init__(self, message: str, hint: str | None, index: int) -> None:
        super().__init__(message, hint)
        self.index = index


def tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return everything that decides what the tokenizer makes of a text, as canonical JSON."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # What an earlier call may have left behind; it isn't the tokenizer's own.
    backend["truncation"] = backend["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([backend, tokenizer.chat_template, special], sort_keys=True)


class TextEncoder:
    """Encodes marked texts with one tokenizer. Segments come back whole: truncation is the caller's.

    Raises:
        ModelError: the tokenizer gives no character offsets or has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool = True) -> None:
        _check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._adds = add_special_tokens
        self._eos_id = int(tokenizer.eos_token_id)
        bos_id = tokenizer.bos_token_id
        # What a text brings may be what is added to it: a beginning or an end stands once.
        self._twice_bos, self._twice_eos = [bos_id] * 2, [self._eos_id] * 2

    def __reduce__(self) -> tuple[Any, ...]:
        # The aligner is made anew where it is needed: it is far larger than what it is made of.
        return TextEncoder, (self._tokenizer, self._adds)

    @cached_property
    def _aligner(self) -> Aligner:
        return Aligner(self._tokenizer, self._adds)

    def encode(self, texts: Sequence[MarkedText]) -> Iterator[Segment]:
        """Yield the segment of each text as it is asked for."""
        texts = [self._to_its_end(marked) if marked.text[-1:].isspace() else marked for marked in texts]
        aligned = self._aligner.align([marked.text for marked in texts], [marked.spans for marked in texts])
        return map(self._label, texts, aligned)

    def encode_rows(self, rows: Sequence[Sequence[MarkedText]]) -> Iterator[list[Example]]:
        """Yield the examples of each row as they are asked for: every text is one, of one segment."""
        segments = self.encode([marked for row in rows for marked in row])
        return ([Example((next(segments),)) for _ in row] for row in rows)

    def split_prompt(self, text: str, start: int) -> tuple[str, tuple[int, ...]]:
        """Return the beginning of a text that is trained from character `start` on, and its token ids [P].

        They are the text's own ids before the first trained one: a token that reaches beyond `start` is trained.
        """
        ids, end = self._aligner.split(text, start)
        while ids[:2] == self._twice_bos:
            del ids[0]
        return text[:end], tuple(ids)

    def _to_its_end(self, marked: MarkedText) -> MarkedText:
        """Return the text without the white space behind an end token that it brings."""
        text = marked.text.rstrip()
        if marked.ends or not text.endswith(str(self._tokenizer.eos_token)):
            return marked
        spans = tuple((start, min(end, len(text))) for start, end in marked.spans if start < len(text))
        return MarkedText(text, spans, marked.ends)

    def _label(self, marked: MarkedText, aligned: Aligned) -> Segment:
        ids, spans = aligned.input_ids, aligned.spans
        while ids[:2] == self._twice_bos:
            del ids[0]
            spans = [(max(begin - 1, 0), stop - 1) for begin, stop in spans]
        if not marked.ends:
            # The end token may be there already: the tokenizer adds it, or the text ends in it.
            is_last_trained = bool(spans) and spans[-1][1] == len(ids)
            if ids[-1:] != [self._eos_id] or not (aligned.is_last_added or is_last_trained):
                ids.append(self._eos_id)
            if not spans or spans[-1][1] < len(ids):
                spans.append((len(ids) - 1, len(ids)))
        while ids[-2:] == self._twice_eos and any(begin <= len(ids) - 2 < stop for begin, stop in spans):
            ids.pop()
            spans = [(begin, min(stop, len(ids))) for begin, stop in spans if begin < len(ids)]
        return Segment(ids, [(max(begin, 1), stop) for begin, stop in spans if stop > 1])


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    name = name_of(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of `{name}` gives no character offsets, which the labels come from",
            "use a model that ships a fast tokenizer (tokenizer.json)",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of `{name}` has no end token, so the model could not learn to stop",
            "set `eos_token` in the model's tokenizer_config.json",
        )


def name_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what to call the tokenizer in an error."""
    return tokenizer.name_or_path or type(tokenizer).__name__
