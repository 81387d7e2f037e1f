"""`inspect --html`: the data of a run on one page that needs nothing but itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape

from tunesmith.atomic_files import write_bytes
from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.comparison import RowHashes
from tunesmith.data.fates import find_fates
from tunesmith.data.fit import choose_limits
from tunesmith.data.formats import RowFormat
from tunesmith.data.prepare import Prepared
from tunesmith.data.sources import describe_source
from tunesmith.data.summary import percent
from tunesmith.data.token_set import TokenSet
from tunesmith.errors import ConfigError
from tunesmith.paths import is_dir
from tunesmith.view.cards import Card, CardMaker
from tunesmith.view.counts import Count, compare_sets, list_counts
from tunesmith.view.examples_shown import ShownSet, choose_shown, share_out, show_set
from tunesmith.view.lengths import describe_lengths, draw_lengths
from tunesmith.view.page import render_page
from tunesmith.view.pieces import Speller
from tunesmith.view.shaping import list_settings, list_templates
from tunesmith.view.stretches import fill_evenly
from tunesmith.view.visible import escape_unseen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUOTED = re.compile(r"`([^`]+)`")
_TOKENS_SHOWN = 36_000
# With what stands above them, two megabytes at most.
_CARDS_BYTES = 1_750_000


@dataclass(frozen=True, eq=False)
class Inspected:
    """What is looked at: the prepared data of `config`, the formats of its data sets with the tokenizer, the rows' hashes."""

    config: TrainConfig
    formats: Sequence[RowFormat]
    tokenizer: PreTrainedTokenizerFast
    prepared: Prepared
    hashes: dict[str, RowHashes]

    @property
    def sources(self) -> list[tuple[HFDatasetConfig, RowFormat]]:
        """The settings and the format of each data set, by `dataset_id`."""
        return list(zip(self.config.sources, self.formats, strict=True))

    @property
    def sets(self) -> dict[str, TokenSet]:
        """The sets that are tokenized, by name."""
        validation = self.prepared.validation
        return {"training": self.prepared.train} | ({} if validation is None else {"validation": validation})


@dataclass(frozen=True)
class DataSetRow:
    """A line of the table of data sets; rows and tokens are the training set's."""

    name: str
    read_as: str
    why: Markup
    num_rows: int
    num_examples: int
    num_tokens: int
    share: str


def check_page_path(path: Path) -> None:
    """Refuse a page that couldn't be written, before the work that it costs.

    Raises:
        ConfigError: its folder is absent or can't be written, or it isn't named like a page.
    """
    folder = path.parent
    if path.suffix.lower() not in (".html", ".htm"):
        # What stands behind `--html` may be the run's own file, to be overwritten.
        raise ConfigError(f"`--html` is `{path}`, which isn't named like a page", "write --html page.html")
    if is_dir(path):
        raise ConfigError(
            f"`--html` is a folder: `{path}`", f"name a file in it: --html {path / 'page.html'}"
        )
    if not is_dir(folder):
        raise ConfigError(f"`--html` is to go into `{folder}`, which is no folder", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"`--html` can't be written into `{folder}`", "name a file in a folder of yours")


def write_page(inspected: Inspected, path: Path) -> None:
    """Write the page: whole, or not at all. Rows are shown as text, never run; see `render_page`.

    Raises:
        ConfigError: it can't be written.
    """
    page = _render(inspected)
    try:
        write_bytes(path, [page])
    except OSError as error:
        raise ConfigError(
            f"can't write `{path}`: {error.strerror or error}", "name a file that --html can write"
        ) from error


def _render(inspected: Inspected) -> bytes:
    config, train = inspected.config, inspected.prepared.train
    shown = [
        show_set(name, inspected.prepared.data_dir, tokens, inspected.hashes)
        for name, tokens in inspected.sets.items()
    ]
    sizes = [len(of_set.dropped) + of_set.tokens.num_examples for of_set in shown]
    cards, num_left_out = _make_cards(inspected, shown, share_out(*sizes))
    return render_page(
        "tunesmith.view",
        "inspect_page",
        model=escape_unseen(config.model.name),
        data_sets=_list_data_sets(inspected),
        stats=inspected.prepared.stats.train,
        percent=percent,
        sets=["training", *(["validation"] if "validation" in inspected.sets else []), "test"],
        counts=list(_tabulate(inspected)),
        bars=draw_lengths(train.lengths, config.max_seq_length),
        lengths=describe_lengths(train.lengths),
        max_seq_length=config.max_seq_length,
        settings=list(list_settings(config)),
        texts=list(list_templates(inspected.sources, inspected.tokenizer)),
        cards=cards,
        kinds=_count_kinds(cards),
        num_left_out=num_left_out,
        num_in_all=sum(sizes),
    )


def _make_cards(
    inspected: Inspected, shown: Sequence[ShownSet], limits: Sequence[int]
) -> tuple[list[Card], int]:
    """Return the cards of the sets in the order of their rows, and how many had no room."""
    config = inspected.config
    chosen = [choose_shown(of_set, limit, config.seed) for of_set, limit in zip(shown, limits, strict=True)]
    lengths = [
        int(of_set.tokens.lengths[choice.example]) if choice.example is not None else config.max_seq_length
        for of_set, choices in zip(shown, chosen, strict=True)
        for choice in choices
    ]
    allowance = fill_evenly(lengths, _TOKENS_SHOWN)
    speller = Speller(inspected.tokenizer)
    length_limits = choose_limits(config, inspected.formats)
    cards: list[Card] = []
    num_bytes = num_left_out = 0
    for of_set, choices in zip(shown, chosen, strict=True):
        maker = CardMaker(of_set, speller, config.max_seq_length)
        rows = {choice.row for choice in choices}
        fates = find_fates(of_set.rows_file, rows, inspected.formats, length_limits)
        of_this: list[Card] = []
        for choice in choices:
            card = maker.lay_out(choice, fates[choice.row], allowance)
            size = len(card.body.encode(errors="replace"))
            if num_bytes + size > _CARDS_BYTES:
                num_left_out += 1
                continue
            num_bytes += size
            of_this.append(card)
        cards += sorted(of_this, key=lambda card: (card.row, card.part))
    return cards, num_left_out


def _count_kinds(cards: Sequence[Card]) -> list[tuple[str, str, int]]:
    """Return what one can filter by: value, label, and how many cards are of it."""
    labels = {
        "truncated": "truncated",
        "dropped": "dropped",
        "repeated": "repeated",
        "shared": "in another set too",
    }
    counts = {kind: sum(kind in card.kinds for card in cards) for kind in labels}
    return [(kind, labels[kind], count) for kind, count in counts.items() if count]


def _list_data_sets(inspected: Inspected) -> list[DataSetRow]:
    train, hashes = inspected.prepared.train, inspected.hashes["training"]
    num_sets = len(inspected.formats)
    tokens = np.bincount(train.dataset_ids, weights=train.lengths, minlength=num_sets).astype(np.int64)
    examples = np.bincount(train.dataset_ids, minlength=num_sets)
    rows = np.bincount(hashes.dataset_ids, minlength=num_sets)
    return [
        DataSetRow(
            escape_unseen(describe_source(settings).replace("`", "")),
            row_format.name,
            _with_code(row_format.why),
            int(rows[i]),
            int(examples[i]),
            int(tokens[i]),
            percent(int(tokens[i]), int(tokens.sum())),
        )
        for i, (settings, row_format) in enumerate(inspected.sources)
    ]


def _with_code(text: str) -> Markup:
    """Return a sentence of ours with what stands between backticks as code."""
    return Markup(_QUOTED.sub(r"<code>\1</code>", str(escape(escape_unseen(text)))))


def _tabulate(inspected: Inspected) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the lines of the table of counts: label, explanation, and a value for each set."""
    stats = inspected.prepared.stats
    of_sets = {"training": list_counts(stats.train)}
    if stats.validation is not None:
        of_sets["validation"] = list_counts(stats.validation)
    of_sets["test"] = [Count("rows", f"{stats.test_rows:,}")]
    yield from _join(of_sets)
    compared = compare_sets(inspected.hashes)
    yield from _join({name: compared[name] for name in of_sets})


def _join(of_sets: Mapping[str, list[Count]]) -> Iterator[tuple[str, str, list[str]]]:
    for line in zip_longest(*of_sets.values()):
        if line[0].is_rare and all(count is None or count.value == "0" for count in line):
            continue
        yield line[0].label, line[0].explanation, [count.value if count else "" for count in line]
