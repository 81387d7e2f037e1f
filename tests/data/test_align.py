"""Where the tokens of a text lie: what their bytes tell is what the tokenizer's own offsets tell."""

from __future__ import annotations

import json
import pickle
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.data.align import Aligned, Aligner

PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["<|endoftext|>", "</s>", "<|im_end|>", "[SEP]", "<think>", " ", "\n\n", "e\u0301", "👋🏽", "The "]
    ),
)


def copy_of(kind: str) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = pickle.loads(pickle.dumps(build_tokenizer(kind)))
    return tokenizer


@lru_cache
def build(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of this kind, or a byte-level one with what makes tokens spell less or more than the text."""
    if kind == "composes characters":
        tokenizer = copy_of("qwen3")
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    elif kind == "strips around an added token":
        tokenizer = copy_of("byte_bpe")
        tokenizer.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True)])
    elif kind == "puts a space before":
        tokenizer = copy_of("byte_bpe")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "adds tokens around":
        tokenizer = copy_of("byte_bpe")
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
    else:
        return build_tokenizer(kind)
    return tokenizer


@lru_cache
def build_untrimmed(kind: str) -> Tokenizer:
    """Return a whole copy of the tokenizer whose offsets cover white space too."""
    content = build(kind).backend_tokenizer.to_str()
    return Tokenizer.from_str(content.replace('"trim_offsets":true', '"trim_offsets":false'))


def tokens_on(encoding: Encoding, start: int, end: int) -> list[int]:
    return [
        i
        for i, ((first, beyond), is_added) in enumerate(
            zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        )
        if beyond > start and first < end and not is_added
    ]


def align(tokenizer: PreTrainedTokenizerFast, text: str, spans: Any, add_special_tokens: bool) -> Aligned:
    (aligned,) = Aligner(tokenizer, add_special_tokens).align([text], [spans])
    return aligned


@pytest.mark.parametrize(
    "kind",
    [
        *TOKENIZER_KINDS,
        "composes characters",
        "strips around an added token",
        "puts a space before",
        "adds tokens around",
    ],
)
@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(PIECES, min_size=2, max_size=6), add_special_tokens=st.booleans(), data=st.data())
def test_tokens_lie_where_the_tokenizer_itself_puts_them(
    kind: str, pieces: list[str], add_special_tokens: bool, data: st.DataObject
) -> None:
    text = "".join(pieces)
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4, unique=False)))
    spans = [(start, end) for start, end in (borders[:2], borders[2:]) if start < end]
    aligned = align(build(kind), text, spans, add_special_tokens)
    encoding = build_untrimmed(kind).encode(text, add_special_tokens=add_special_tokens)
    assert aligned.input_ids == encoding.ids
    assert aligned.is_last_added == (encoding.special_tokens_mask[-1:] == [1])
    expected = [tokens for start, end in spans if (tokens := tokens_on(encoding, start, end))]
    assert [list(range(begin, stop)) for begin, stop in aligned.spans] == expected


def test_a_text_whose_tokens_spell_less_than_it_is_aligned_by_offsets() -> None:
    tokenizer = build("strips around an added token")
    text = "So   <think>   so."
    aligned = align(tokenizer, text, [(0, 2), (15, len(text))], False)
    assert [tokenizer.decode(aligned.input_ids[begin:stop]) for begin, stop in aligned.spans] == ["So", "so."]


@pytest.mark.parametrize("kind", ["byte_bpe", "llama2"])
def test_the_tokenizer_itself_stays_as_it_was(kind: str) -> None:
    tokenizer = copy_of(kind)
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    align(tokenizer, "So <think> so.", [(3, 10)], True)
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before
