"""Text of unknown origin made visible, tokens spelt one by one, and long examples shortened in their middles."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.view.pieces import Speller
from tunesmith.view.stretches import cut_stretches, fill_evenly
from tunesmith.view.visible import escape_unseen, mark_up, shorten_middle


class Content(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.tags: set[str] = set()
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 你好 שלום 👋🏽", "plain é 你好 שלום 👋🏽"),
        ("a\nb\tc  d", "a\nb\tc  d"),
        ("\x00\x1b[0m\x7f\x85\r", "\\x00\\x1b[0m\\x7f\\x85\\x0d"),
        ("\u202e\u2066\u200b\ufeff\u00ad", "\\u202e\\u2066\\u200b\\ufeff\\xad"),
        ("\u00a0\u2003\u2028\u3000", "\\xa0\\u2003\\u2028\\u3000"),
        ("\U000e0041\ue000\ud83d\u3164\ufe0f", "\\U000e0041\\ue000\\ud83d\\u3164\\ufe0f"),
    ],
)
def test_what_is_not_seen_is_spelt_out(text: str, shown: str) -> None:
    assert escape_unseen(text) == shown


@given(st.text())
def test_markup_holds_the_text_and_nothing_else(text: str) -> None:
    found = Content(str(mark_up(text)))
    assert found.text == escape_unseen(text)
    assert found.tags <= {"b", "u"}
    assert all(unicodedata.category(c) not in ("Cf", "Cs", "Zl", "Zp") for c in found.text)
    assert all(unicodedata.category(c) != "Cc" or c in "\n\t" for c in found.text)


def test_a_long_text_is_shortened_in_its_middle() -> None:
    assert shorten_middle("abcdef", 6) == "abcdef"
    assert shorten_middle("ab1234567cd", 4) == "ab … 7 characters … cd"


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_the_pieces_of_a_text_are_the_text(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    ids = tokenizer("Add 1\nand 2:  three 你好 👋🏽 é x\u202e Größe\t.\r\n ok")["input_ids"]
    pieces = list(Speller(tokenizer).spell(ids, 0, len(ids)))
    assert "".join(piece.text for piece in pieces) == tokenizer.backend_tokenizer.decode(ids, False)
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert sum(piece.stop - piece.start for piece in pieces) == len(ids)
    assert all("�" not in piece.text for piece in pieces)


def test_tokens_that_only_together_are_a_character_are_one_piece() -> None:
    tokenizer = build_tokenizer("chatml")
    ids = tokenizer("a👩b<|im_end|>")["input_ids"]
    pieces = list(Speller(tokenizer).spell(ids, 0, len(ids)))
    assert [piece.text for piece in pieces] == ["a", "👩", "b", "<|im_end|>"]
    assert [piece.is_added for piece in pieces] == [False, False, False, True]
    assert pieces[1].stop - pieces[1].start > 1
    cut = list(Speller(tokenizer).spell(ids, 0, 2))
    assert [piece.text for piece in cut] == ["a", "�"], "cut within the character"


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_the_limit_fills_the_budget_and_a_larger_one_would_not_fit(sizes: list[int], budget: int) -> None:
    limit = fill_evenly(sizes, budget)
    assert sum(min(size, limit) for size in sizes) <= budget
    larger = sum(min(size, limit + 1) for size in sizes)
    assert larger > budget or limit >= max(sizes, default=0)


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(0, 400))
def test_stretches_cover_the_example_and_only_middles_are_hidden(flags: list[bool], allowance: int) -> None:
    stretches = list(cut_stretches(np.array(flags), allowance))
    assert [flag for it in stretches for flag in [it.is_trained] * (it.stop - it.start)] == flags
    for it in stretches:
        assert it.start <= it.hidden_from <= it.hidden_to == it.stop or (
            it.start <= it.hidden_from < it.hidden_to <= it.stop and it.hidden_to - it.hidden_from >= 24
        )


def test_a_long_prompt_and_a_short_answer_both_show_their_ends() -> None:
    flags = np.array([False] * 1000 + [True] * 10)
    prompt, answer = cut_stretches(flags, 110)
    assert (prompt.hidden_from, prompt.hidden_to) == (50, 950)
    assert (answer.start, answer.hidden_from, answer.hidden_to, answer.stop) == (1000, 1010, 1010, 1010)
