"""What an answer's pieces make together is what the whole of it decodes to."""

from __future__ import annotations

import pytest

from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.serving.streaming import TextStream

TEXTS = [
    "The capital is Paris.",
    "  two blanks, and\n\nlines \n",
    "Größe, café 你好，世界。 👋🏽 “quoted” é",
    "def add(a, b):\n    return a + b",
    "don't, it's: [1, 2] ('a')",
    "",
]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_whole(kind: str, text: str) -> None:
    tokenizer = build_tokenizer(kind)
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_come_as_soon_as_they_are_whole() -> None:
    tokenizer = build_tokenizer("byte_bpe")
    ids = tokenizer("The 👋 waves").input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert pieces[0] == tokenizer.decode(ids[:1])
    assert sum(map(bool, pieces)) > 5
    assert stream.flush() == ""


def test_half_a_character_at_the_end_is_shown_as_decoding_shows_it() -> None:
    tokenizer = build_tokenizer("byte_bpe")
    ids = tokenizer("so 👋").input_ids[:-1]
    stream = TextStream(tokenizer)
    shown = "".join(map(stream.push, ids))
    assert shown == "so" and shown + stream.flush() == tokenizer.decode(ids)
