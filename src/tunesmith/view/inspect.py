"""`tunesmith inspect`: what a run would train on, shown before it is paid for."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config import TrainConfig
from tunesmith.data.comparison import RowHashes, are_shared, count_repeats, hash_sets
from tunesmith.data.prepare import Prepared, describe_formats, prepare
from tunesmith.data.shares import measure_shares
from tunesmith.data.split import SETS, check_sources
from tunesmith.data.summary import percent
from tunesmith.data.token_set import TokenSet
from tunesmith.errors import ModelError
from tunesmith.model.adapters.new_tokens import count_rows_asked, load_run_tokenizer
from tunesmith.model.adapters.prior import with_prior_settings
from tunesmith.model.files.fetched import with_model_here
from tunesmith.model.load import load_model_config
from tunesmith.model.vocabulary import check_data_tokens
from tunesmith.paths import exists, expand_user
from tunesmith.remote.copies import copies_in
from tunesmith.runs.identity import locate_run, recorded_date
from tunesmith.view.counts import list_counts
from tunesmith.view.inspect_page import Inspected, check_page_path, write_page
from tunesmith.view.lengths import bin_lengths
from tunesmith.view.visible import escape_unseen, shorten_middle

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_BINS = 12
_BAR_WIDTH = 40
_LONGEST_SHOWN_CHARS = 2000


def inspect(config: TrainConfig, num_examples: int = 3, html: Path | None = None) -> None:
    """Print, to stdout, examples with their trained tokens marked, and the figures of the prepared data.

    `html` is the page to write besides.

    Raises:
        ConfigError: the page can't be written.
        TunesmithError: as `prepare` does.
    """
    from rich.console import Console

    if html is not None:
        check_page_path(html)
    console = Console(highlight=False)
    with copies_in(config.home):
        _inspect(config, console, num_examples, html)


def _inspect(config: TrainConfig, console: Console, num_examples: int, html: Path | None) -> None:
    config = with_prior_settings(config)
    formats = check_sources(config)
    here = with_model_here(config, weights=False)
    tokenizer = load_run_tokenizer(here)
    # The hub's config may not be at hand; a folder's is, and a training would refuse it if it is malformed.
    model_config = load_model_config(here.model) if here.model.folder is not None else None
    with prepared_to_look_at(config, tokenizer) as prepared:
        for line in [*describe_formats(config, formats), *prepared.stats.notes]:
            console.print(escape_unseen(line), soft_wrap=True, markup=False)
        _print_examples(console, prepared.train, tokenizer, num_examples)
        _print_lengths(console, prepared.train, config.max_seq_length)
        _print_stats(console, prepared)
        _print_shares(console, prepared, config)
        hashes = hash_sets(prepared.data_dir, formats)
        _print_duplicates(console, hashes)
        if model_config is not None:
            _warn_of_unknown_tokens(prepared, tokenizer, model_config, config)
        if html is not None:
            date = prepared.date or recorded_date(None)
            ready = [row_format.with_tokenizer(tokenizer, date) for row_format in formats]
            write_page(Inspected(config, ready, tokenizer, prepared, hashes), html)
            console.print(f"page: {html}", soft_wrap=True, markup=False)


def _warn_of_unknown_tokens(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerFast,
    model_config: PretrainedConfig,
    config: TrainConfig,
) -> None:
    num_known = getattr(model_config.get_text_config(), "vocab_size", None)
    if num_known is None:
        return
    try:
        sets = (prepared.train, prepared.validation)
        num_known = max(num_known, count_rows_asked(config))
        check_data_tokens(sets, tokenizer, num_known, str(config.model.source))
    except ModelError as error:
        logger.warning("a training would refuse this: %s", error.message)


@contextmanager
def prepared_to_look_at(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[Prepared]:
    """Prepare the data under `config.home` if that was given, where a run finds them again, else for a while.

    `config.data_dir` is left alone.

    Raises:
        TunesmithError: as `prepare` does.
    """
    run = locate_run(config)
    date = recorded_date(run.read_params() if exists(run.params_path) else None)
    config = config.model_copy(update={"data_dir": None})
    if config.home is not None:
        yield prepare(config, tokenizer, expand_user(config.home) / "datasets", date)
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        yield prepare(config, tokenizer, Path(folder) / "datasets", date)


def _print_examples(
    console: Console, tokens: TokenSet, tokenizer: PreTrainedTokenizerFast, num_examples: int
) -> None:
    chosen = np.unique(
        np.linspace(0, tokens.num_examples - 1, min(num_examples, tokens.num_examples)).astype(int)
    )
    for index in chosen.tolist():
        ids, trained = tokens.example(index)
        title = (
            f"example {index + 1:,} of {tokens.num_examples:,}: {len(ids)} tokens, {trained.sum()} trained"
        )
        console.rule(title, align="left")
        console.print(mark_trained(tokenizer, ids, trained), soft_wrap=True)
    console.rule("⟦…⟧ is trained, ↵ a newline", align="left")


def mark_trained(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, trained: np.ndarray) -> Text:
    """Return the example's text: trained stretches in green and between ⟦ and ⟧, newlines as ↵."""
    from rich.text import Text

    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    before = ""
    for start, end in pairwise(borders):
        # Decoded from the beginning, because some decoders drop the space before a first token.
        so_far = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = shorten_middle(escape_unseen(so_far[len(before) :]), _LONGEST_SHOWN_CHARS)
        piece = piece.replace("\n", "↵\n")
        before = so_far
        if trained[start]:
            text.append(f"⟦{piece}⟧", style="bold green")
        else:
            text.append(piece, style="dim")
    return text


def _print_lengths(console: Console, tokens: TokenSet, max_seq_length: int) -> None:
    console.print(f"\nlengths of the training examples, in tokens (max_seq_length {max_seq_length})")
    longest = int(tokens.lengths.max())
    bins = bin_lengths(tokens.lengths, longest, _BINS)
    width, highest = len(f"{longest:,}"), max(it.count for it in bins)
    for it in bins:
        bar = "█" * round(_BAR_WIDTH * it.count / highest) or ("▏" if it.count else "")
        console.print(f"  {it.low + 1:>{width},} – {it.high:>{width},}  {bar} {it.count:,}")


def _print_stats(console: Console, prepared: Prepared) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    columns = [list_counts(prepared.stats.train)]
    table.add_column("training", justify="right")
    if prepared.stats.validation is not None:
        table.add_column("validation", justify="right")
        columns.append(list_counts(prepared.stats.validation))
    for line in zip(*columns, strict=True):
        if not line[0].is_rare or any(count.value != "0" for count in line):
            table.add_row(line[0].label, *(count.value for count in line))
    console.print(table)
    for what, count in prepared.stats.train.findings.items():
        console.print(f"training set: {count:,} {what}", soft_wrap=True)
    console.print(f"test set: {prepared.stats.test_rows:,} rows, not tokenized")


def _print_shares(console: Console, prepared: Prepared, config: TrainConfig) -> None:
    """Print what an epoch takes of each data set; nothing of a single one that is taken as it is."""
    from rich import box
    from rich.table import Table

    if len(config.data_sets) == 1 and config.weight == 1.0:
        return
    table = Table(box=box.SIMPLE_HEAD, title="what an epoch takes, of the training set", title_justify="left")
    table.add_column("data set", overflow="fold")
    for heading in ("weight", "rows", "share", "tokens", "share"):
        table.add_column(heading, justify="right")
    for share in measure_shares(prepared.train, config.data_sets):
        table.add_row(
            share.name,
            f"{share.weight:g}",
            f"{share.rows:,}",
            f"{100 * share.row_share:.1f} %",
            f"{share.tokens:,}",
            f"{100 * share.token_share:.1f} %",
        )
    console.print(table)


def _print_duplicates(console: Console, hashes: dict[str, RowHashes]) -> None:
    alike = {name: of_set.alike for name, of_set in hashes.items()}
    num_rows = sum(map(len, alike.values()))
    duplicates = count_repeats(list(alike.values()))
    console.print(
        f"duplicates: {duplicates:,} of {num_rows:,} rows repeat another ({percent(duplicates, num_rows)})"
    )
    for name in SETS[1:]:
        shared = int(are_shared(alike[name], [alike["training"]]).sum())
        console.print(
            f"overlap: {shared:,} of {len(alike[name]):,} {name} rows are in the training set too "
            f"({percent(shared, len(alike[name]))})"
        )
    console.print("(rows are compared by what they say, without regard to case and white space)", style="dim")
