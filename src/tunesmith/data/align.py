"""A text → its token ids, and which of them lie on given characters.

Byte-level tokenizers (GPT-2's kind: Llama 3, Qwen, SmolLM) spell a text byte for byte, so the bytes of its tokens
tell where each lies. Tokenizers that aren't asked for offsets are a quarter faster. The bytes are checked for every
text; where they differ, and for other tokenizers, the offsets are asked for.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]

# What a tokenizer that isn't byte-level, or changes the text, spells otherwise.
_PROBE = "Aé 👋\n a"


@dataclass(frozen=True)
class Aligned:
    """A text's token ids, those around it that the tokenizer adds included.

    `spans` are runs of tokens, each its first and the one after its last, in the order of the spans of characters
    that they lie on.
    """

    input_ids: list[int]
    spans: list[Span]
    is_last_added: bool


class Aligner:
    """Tokenizes texts, and finds the tokens that lie on spans of characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool) -> None:
        self._backend = _untrimmed(tokenizer)
        self._adds = add_special_tokens
        probe = self._backend.encode(_PROBE, add_special_tokens=add_special_tokens)
        first, beyond = _find_text(probe)
        self._before, self._after = probe.ids[:first], probe.ids[beyond:]
        self._spelling = _Spelling(self._backend)
        self._is_byte_level = b"".join(self._spelling.spell(probe.ids[first:beyond])) == _PROBE.encode()

    def align(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> Iterator[Aligned]:
        """Yield the tokens of each text, and which of them end after the start of each span and start before its end.

        A span without a token is left out.
        """
        if self._is_byte_level:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            for text, of_text, encoding in zip(texts, spans, encodings, strict=True):
                yield self._align_bytes(text, of_text, encoding.ids)
        else:
            encodings = self._backend.encode_batch(texts, add_special_tokens=self._adds)
            for of_text, encoding in zip(spans, encodings, strict=True):
                yield _align_offsets(of_text, encoding)

    def split(self, text: str, start: int) -> tuple[list[int], int]:
        """Return the ids of a text's tokens before the first that ends after character `start`, and where that begins.

        What the tokenizer puts before a text is among them.
        """
        (aligned,) = self.align([text], [((start, len(text)),)])
        encoding = self._backend.encode(text, add_special_tokens=self._adds)
        first = aligned.spans[0][0] if aligned.spans else _find_text(encoding)[1]
        chars = encoding.token_to_chars(first) if aligned.spans else None
        return aligned.input_ids[:first], chars[0] if chars else start

    def _align_bytes(self, text: str, spans: Sequence[Span], ids: list[int]) -> Aligned:
        pieces = self._spelling.spell(ids)
        if b"".join(pieces) != text.encode():
            return _align_offsets(spans, self._backend.encode(text, add_special_tokens=self._adds))
        ends = list(accumulate(map(len, pieces)))
        shift = len(self._before)
        found = []
        for start, end in spans:
            begin = bisect_right(ends, len(text[:start].encode()))
            stop = bisect_left(ends, len(text[:end].encode()), begin) + 1
            found.append((shift + begin, shift + stop))
        return Aligned([*self._before, *ids, *self._after], found, bool(self._after))


class _Spelling(dict[int, bytes]):
    """The bytes that each token of a byte-level tokenizer stands for."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._letters = _byte_letters()

    def __missing__(self, token_id: int) -> bytes:
        if token_id in self._added:
            spelt = self._added[token_id].content.encode()
        else:
            token = self._backend.id_to_token(token_id)
            assert token is not None
            spelt = token.translate(self._letters).encode("latin-1", "ignore")
        self[token_id] = spelt
        return spelt

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        return list(map(self.__getitem__, ids))


def _byte_letters() -> dict[int, int]:
    """Return the letters that byte-level vocabularies write bytes with (GPT-2's `bytes_to_unicode`), and the bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {256 + number: byte for number, byte in enumerate(others)}


def _untrimmed(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a tokenizer of the same tokens whose offsets cover all characters; it shares the model."""
    from tokenizers import Tokenizer, models

    own = tokenizer.backend_tokenizer
    # Only what the labels need is copied: to load the vocabulary again takes far longer.
    shell = Tokenizer(models.BPE())
    shell.normalizer = own.normalizer
    shell.pre_tokenizer = own.pre_tokenizer
    shell.post_processor = own.post_processor
    content = json.loads(shell.to_str())
    # Trimmed offsets leave white space out, so a token of it seems to end where it begins.
    _untrim(content["post_processor"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.model = own.model
    added = own.get_added_tokens_decoder()
    backend.add_tokens([added[token_id] for token_id in sorted(added)])
    return backend


def _untrim(processor: Any) -> None:
    if isinstance(processor, dict):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
        for part in processor.values():
            _untrim(part)
    elif isinstance(processor, list):
        for part in processor:
            _untrim(part)


def _find_text(encoding: Encoding) -> Span:
    """Return the run of tokens that the text itself gave, between those that the tokenizer added."""
    added = encoding.special_tokens_mask
    first = next((i for i, is_added in enumerate(added) if not is_added), len(added))
    beyond = len(added) - next((i for i, is_added in enumerate(reversed(added)) if not is_added), 0)
    return first, max(first, beyond)


def _align_offsets(spans: Sequence[Span], encoding: Encoding) -> Aligned:
    def chars_of(token: int) -> Span:
        chars = encoding.token_to_chars(token)
        # Only a token that the tokenizer adds has none.
        assert chars is not None
        return chars

    first, beyond = _find_text(encoding)
    # Searched rather than listed: a list of all offsets costs more than the rest of the labelling.
    tokens = range(len(encoding.ids))
    found = []
    for start, end in spans:
        begin = bisect_right(tokens, start, first, beyond, key=lambda token: chars_of(token)[1])
        stop = bisect_left(tokens, end, begin, beyond, key=lambda token: chars_of(token)[0])
        if begin < stop:
            found.append((begin, stop))
    is_last_added = bool(encoding.special_tokens_mask[-1:] == [1])
    return Aligned(encoding.ids, found, is_last_added)
