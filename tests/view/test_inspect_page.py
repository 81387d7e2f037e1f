"""The page of `inspect --html`: what it shows of the data, and that nothing in a row acts in a real browser."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from support.browser import listening, needs_browser, photograph, read_console, render
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.config import TrainConfig
from tunesmith.view import inspect_page
from tunesmith.view.inspect import inspect
from tunesmith.view.visible import escape_unseen

NASTIES = (
    "<script>document.title = 'owned'</script>",
    "</script><script>document.title = 'owned'</script><!-- ",
    "<img src=x onerror=\"document.title = 'owned'\"> & &lt;b&gt;",
    "\"' onmouseover=\"document.title = 'owned'\" x='",
    "</div></article><style>body { display: none }</style>",
    "{{ cards }} {% raw %}",
    "turned \u202e and \u2066 isolated, zero\u200bwidth, \ufeff",
    "nul \x00, escape \x1b[31m, bell \x07, delete \x7f, next line \x85",
    "lone\rreturn, \r\n and \n  two spaces\tand a tab",
    "👋🏽 👨‍👩‍👧 é, שלום עולם, مرحبا, 你好",
)


class Page(HTMLParser):
    """The cards of a page: their data, their chips, and their text, whole and of each trained stretch."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "article":
            hidden = "hidden" in given
            self.cards.append({**given, "text": "", "trained": [], "why": "", "titles": [], "hidden": hidden})
        if not self.cards:
            return
        if tag == "mark":
            self.cards[-1]["trained"].append("")
        if tag == "i" and "title" in given:
            self.cards[-1]["titles"].append(given["title"])
        if tag not in ("hr", "meta", "link", "input", "br"):
            self._open.append(f"{tag}.{(given.get('class') or '').split(' ')[0]}")

    def handle_endtag(self, tag: str) -> None:
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if "article." not in self._open:
            return
        card = self.cards[-1]
        if "div.text" in self._open:
            card["text"] += data
        if "p.why" in self._open:
            card["why"] += data
        if "mark." in self._open:
            card["trained"][-1] += data

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [card for card in self.cards if kind in card["data-kinds"].split()]


def ask(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def write_page(
    folder: Path,
    rows: dict[str, list[dict[str, Any]]],
    kind: str = "chatml",
    share_of_test: float = 0.0,
    **settings: Any,
) -> Path:
    """Write the page of the rows of each data set, and return where it is."""
    build_tokenizer(kind).save_pretrained(folder / "model")
    LlamaConfig().save_pretrained(folder / "model")
    for name, of_set in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in of_set))
    split = {"train_split_ratio": 0.9, "val_test_split_ratio": share_of_test}
    sources = [{"dataset_name": str(folder / name), **split} for name in rows]
    config = TrainConfig(datasets=sources, model_path=folder / "model", **settings)  # type: ignore[arg-type]
    inspect(config, html=folder / "page.html")
    return folder / "page.html"


def mixed_rows() -> dict[str, list[dict[str, Any]]]:
    chat = [ask(f"What is {i}?", f"It is {i}.") for i in range(40)]
    chat += [ask(nasty, nasty) for nasty in NASTIES]
    chat += [
        ask("word " * 220, "short"),
        ask("short", "word " * 220),
        {"messages": ask("Alone?", "")["messages"][:1]},
    ]
    alpaca = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(20)]
    return {"chat.jsonl": [*chat, chat[0], ask("WHAT is  1?", "it is 1.")], "alpaca.jsonl": alpaca}


def test_cards_mark_what_is_trained_and_say_why_rows_are_not(tmp_path: Path) -> None:
    page = write_page(tmp_path, mixed_rows(), max_seq_length=200)
    source = page.read_text()
    found = Page(source)
    assert len(found.cards) > 60, "all of them: there are fewer than the page holds"
    (plain,) = [card for card in found.cards if "What is 7?" in card["text"]]
    assert plain["trained"] == ["It is 7.<|im_end|>"]
    assert (
        plain["text"] == "<|im_start|>user\nWhat is 7?<|im_end|>\n<|im_start|>assistant\nIt is 7.<|im_end|>"
    )
    assert plain["titles"][0] == "1 “<|im_start|>”" and plain["data-set"] in ("training", "validation")
    (cut,) = found.of_kind("truncated")
    assert re.fullmatch(r"Truncated: [\d,]+ of its [\d,]+ tokens are cut off", cut["why"])
    why = sorted(card["why"] for card in found.of_kind("dropped"))
    assert why == [
        "Dropped: it has no completion, so nothing of it could be trained",
        "Dropped: its prompt alone fills max_seq_length (200), so no trained token is left",
    ]
    assert all(card["trained"] == [] for card in found.of_kind("dropped"))
    alike = [card["text"] for card in found.cards if {"repeated", "shared"} & set(card["data-kinds"].split())]
    assert any("What is 0?" in text for text in alike) and any("WHAT is  1?" in text for text in alike)
    assert {card["data-data"] for card in found.cards if "### Response" in card["text"]} == {"1"}
    assert "chat.jsonl (train) is read as <b>messages</b>" in source
    assert "message[&#39;role&#39;]" in source, "the chat template, escaped"


def test_what_rows_hold_stands_on_the_page_to_the_letter_and_only_as_text(tmp_path: Path) -> None:
    page = write_page(tmp_path, mixed_rows(), max_seq_length=200)
    source = page.read_bytes()
    found = Page(source.decode())
    for nasty in NASTIES:
        shown = escape_unseen(nasty)
        (card,) = [card for card in found.cards if card["trained"] == [f"{shown}<|im_end|>"]]
        assert card["text"].count(shown) == 2
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2\x85", source.replace(b'<b class="t">\t</b>', b""))
    assert not re.search("[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", source.decode())
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert "img" not in found.tags
    assert not re.findall(r"@import|url\(", source.decode())
    assert not re.findall(r'<[a-z]+ (?:[^>]* )?(?:src|href|style|on[a-z]+)="(?!data:)', source.decode())
    assert b"default-src &#39;none&#39;" in source


def test_a_page_of_long_rows_of_odd_characters_stays_below_two_megabytes(tmp_path: Path) -> None:
    odd = "\x1b\u202e<&\"'\x00 " * 60
    page = write_page(
        tmp_path, {"odd.jsonl": [ask(f"{i} {odd}", odd) for i in range(210)]}, max_seq_length=4096
    )
    assert 500_000 < page.stat().st_size < 2_000_000
    cards = Page(page.read_text()).cards
    assert len(cards) > 100
    assert all(card["trained"] and " tokens …" in card["text"] for card in cards)


def test_what_has_no_room_is_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_page, "_CARDS_BYTES", 20_000)
    page = write_page(tmp_path, {"rows.jsonl": [ask(f"What is {i}?", f"It is {i}.") for i in range(60)]})
    (left_out,) = re.findall(r"(\d+) more had no room on the page", page.read_text())
    assert 5 < len(Page(page.read_text()).cards) == 60 - int(left_out) < 30


def test_rows_of_several_sets_are_counted_as_equal_and_as_nearly_equal(tmp_path: Path) -> None:
    words = [f"item {i}" for i in range(200)]
    rows = [{"text": text} for word in words for text in (word, word.upper(), word)]
    page = write_page(tmp_path, {"rows.jsonl": rows}, kind="byte_bpe", share_of_test=0.5).read_text()
    table = {
        re.sub(r"<small>.*", "", label): re.findall(r">([^<]*)</td>", cells)
        for label, cells in re.findall(r'<tr><th scope="row"[^>]*>(.*?)</th>(<td.*)</tr>', page)
    }
    of_sets = dict(zip(("training", "validation", "test"), table["rows"], strict=True))
    repeated = [int(cell.split(" ")[0]) for cell in table["repeated rows"]]
    assert sum(repeated) == 200, "each item is there twice, and both are on one side"
    assert table["in the training set too"] == ["–", "0", "0"]
    nearly = [int(cell.split(" ")[0]) for cell in table["counting nearly equal ones"][1:]]
    assert all(
        0 < shared <= int(of_sets[name]) for name, shared in zip(("validation", "test"), nearly, strict=True)
    )


def test_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        pages.append(write_page(tmp_path / name, mixed_rows(), max_seq_length=200).read_text())
    assert pages[0].replace("one/", "") == pages[1].replace("other/", "")


def test_a_page_that_cannot_be_written_is_refused_before_the_rows_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent.jsonl"
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "run.yaml").write_text("max_steps: 5")
    for page, said in (
        (tmp_path / "no" / "page.html", "which is no folder"),
        (tmp_path / "folder.html", "`--html` is a folder"),
        (tmp_path / "run.yaml", "which isn't named like a page"),
    ):
        assert main(["inspect", f"--dataset_name={absent}", f"--html={page}"]) == 2
        error = capsys.readouterr().err
        assert said in error and "hint: " in error and "absent.jsonl" not in error
    assert (tmp_path / "run.yaml").read_text() == "max_steps: 5"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_verb_writes_the_page_over_an_older_one_and_prints_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write_page(tmp_path, {"rows.jsonl": [ask("Hi", "Hello")] * 3})
    page.write_text("an older one")
    capsys.readouterr()
    words = [f"--dataset_name={tmp_path / 'rows.jsonl'}", f"--model_path={tmp_path / 'model'}"]
    assert main(["inspect", *words, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "⟦Hello<|im_end|>⟧" in printed and f"page: {page}" in printed
    assert Page(page.read_text()).cards


@needs_browser
@pytest.mark.slow
def test_nothing_in_a_row_acts_in_a_browser(tmp_path: Path) -> None:
    with listening() as (address, asked):
        lures = [
            f'<img src="{address}/image">',
            f'<link rel="stylesheet" href="{address}/style"><script src="{address}/script"></script>',
            f"<style>body {{ background: url({address}/background) }}</style>",
        ]
        (tmp_path / "lure").mkdir()
        bare = tmp_path / "lure" / "bare.html"
        bare.write_text(lures[0])
        render(bare)
        assert asked == ["/image"], "a page that asks is heard"
        rows = mixed_rows()
        rows["chat.jsonl"] += [ask(lure, lure) for lure in lures]
        page = write_page(tmp_path, rows, max_seq_length=400)
        document = render(page)
        assert read_console(page) == []
        assert asked == ["/image"]
    assert "<title>What model would train on</title>" in document
    found = Page(document)
    assert found.tags.count("script") == found.tags.count("style") == 1 and "img" not in found.tags
    for nasty in (*NASTIES, *lures):
        assert any(card["trained"] == [f"{escape_unseen(nasty)}<|im_end|>"] for card in found.cards)
    if "TUNESMITH_SCREENSHOTS" in os.environ:
        photograph(page, height=4000)


@needs_browser
@pytest.mark.slow
def test_filters_hide_what_they_do_not_fit_and_without_the_script_all_is_shown(tmp_path: Path) -> None:
    page = write_page(tmp_path, mixed_rows(), max_seq_length=200)
    everything = Page(page.read_text()).cards

    def shown(fragment: str) -> list[dict[str, Any]]:
        return [card for card in Page(render(page, fragment)).cards if not card["hidden"]]

    def texts(cards: Sequence[dict[str, Any]]) -> list[str]:
        return [card["text"] for card in cards]

    assert texts(shown("")) == texts(everything)
    fitting = [card for card in everything if "dropped" in card["data-kinds"].split()]
    assert fitting and texts(shown("#kind=dropped")) == texts(fitting)
    fitting = [card for card in everything if (card["data-data"], card["data-set"]) == ("1", "training")]
    assert fitting and texts(shown("#data=1&set=training")) == texts(fitting)
    assert texts(shown("#text=what+is+7%3F")) == [text for text in texts(everything) if "What is 7?" in text]
    assert '<form class="filters" hidden>' in page.read_text(), "they are there with the script alone"
    assert not any(card["hidden"] for card in everything)
