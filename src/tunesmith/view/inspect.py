"""`tunesmith inspect`: what a run would train on, shown before it is paid for."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config import TrainConfig
from tunesmith.data.mixture import without_tag
from tunesmith.data.prepare import Prepared, describe_formats, prepare
from tunesmith.data.split import SETS, check_sources
from tunesmith.data.token_arrays import SetStats
from tunesmith.data.token_set import TokenSet
from tunesmith.model.load import load_tokenizer
from tunesmith.runs.identity import locate_run, recorded_date

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast

_BINS = 12
_BAR_WIDTH = 40
_LONGEST_SHOWN_CHARS = 2000


def inspect(config: TrainConfig, num_examples: int = 3) -> None:
    """Print, to stdout, examples with their trained tokens marked, and the figures of the prepared data.

    Raises:
        TunesmithError: as `prepare` does.
    """
    from rich.console import Console

    console = Console(highlight=False)
    formats = check_sources(config)
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
    with prepared_to_look_at(config, tokenizer) as prepared:
        for line in describe_formats(config, formats):
            console.print(line, soft_wrap=True)
        _print_examples(console, prepared.train, tokenizer, num_examples)
        _print_lengths(console, prepared.train, config.max_seq_length)
        _print_stats(console, prepared)
        _print_duplicates(console, prepared.data_dir)


@contextmanager
def prepared_to_look_at(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[Prepared]:
    """Prepare the data under `config.home` if that was given, where a run finds them again, else for a while.

    `config.data_dir` is left alone.

    Raises:
        TunesmithError: as `prepare` does.
    """
    run = locate_run(config)
    date = recorded_date(run.read_params() if run.params_path.exists() else None)
    config = config.model_copy(update={"data_dir": None})
    if config.home is not None:
        yield prepare(config, tokenizer, config.home.expanduser() / "datasets", date)
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
        piece = _shorten(so_far[len(before) :]).replace("\n", "↵\n")
        before = so_far
        if trained[start]:
            text.append(f"⟦{piece}⟧", style="bold green")
        else:
            text.append(piece, style="dim")
    return text


def _shorten(piece: str) -> str:
    if len(piece) <= _LONGEST_SHOWN_CHARS:
        return piece
    half = _LONGEST_SHOWN_CHARS // 2
    return f"{piece[:half]} … {len(piece) - 2 * half:,} characters … {piece[-half:]}"


def _print_lengths(console: Console, tokens: TokenSet, max_seq_length: int) -> None:
    console.print(f"\nlengths of the training examples, in tokens (max_seq_length {max_seq_length})")
    longest = int(tokens.lengths.max())
    edges = np.unique(np.linspace(0, longest, min(_BINS, longest) + 1).astype(int))
    # Bins are (low, high], so that the longest examples share one with their like.
    counts = np.diff(np.searchsorted(np.sort(tokens.lengths), edges, "right"))
    width = len(f"{longest:,}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(_BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        console.print(f"  {low + 1:>{width},} – {high:>{width},}  {bar} {count:,}")


def _print_stats(console: Console, prepared: Prepared) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    columns = [_describe(prepared.stats.train)]
    table.add_column("training", justify="right")
    if prepared.stats.validation is not None:
        table.add_column("validation", justify="right")
        columns.append(_describe(prepared.stats.validation))
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    for what, count in prepared.stats.train.findings.items():
        console.print(f"training set: {count:,} {what}", soft_wrap=True)
    console.print(f"test set: {prepared.stats.test_rows:,} rows, not tokenized")


def _describe(stats: SetStats) -> dict[str, str]:
    return {
        "rows": f"{stats.rows:,}",
        "examples": f"{stats.examples:,}",
        "truncated": f"{stats.truncated:,}",
        "dropped": f"{stats.dropped:,}",
        "  without a completion": f"{stats.untrained:,}",
        "tokens": f"{stats.tokens:,}",
        "trained": f"{stats.trained_tokens:,} ({_percent(stats.trained_tokens, stats.tokens)})",
        "longest example": f"{stats.longest:,}",
        "packs": f"{stats.packs:,}",
        "packing efficiency": f"{100 * stats.packing_efficiency:.1f} %",
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _print_duplicates(console: Console, data_dir: Path) -> None:
    hashes = {name: _hash_rows(data_dir / f"{name}.jsonl") for name in SETS}
    everything = np.concatenate(list(hashes.values()))
    duplicates = len(everything) - len(np.unique(everything))
    console.print(
        f"duplicates: {duplicates:,} of {len(everything):,} rows repeat another ({_percent(duplicates, len(everything))})"
    )
    for name in SETS[1:]:
        shared = int(np.isin(hashes[name], hashes["training"]).sum())
        console.print(
            f"overlap: {shared:,} of {len(hashes[name]):,} {name} rows are in the training set too "
            f"({_percent(shared, len(hashes[name]))})"
        )
    console.print("(rows are compared whole, without regard to case and white space)", style="dim")


def _hash_rows(file: Path) -> np.ndarray:
    """Return a 64-bit hash of each row's text, case and white space folded."""

    def hashes() -> Iterator[int]:
        with file.open("rb") as stream:
            for line in stream:
                folded = json.dumps(_fold(without_tag(json.loads(line))), sort_keys=True)
                yield int.from_bytes(blake2b(folded.encode(), digest_size=8).digest(), "little")

    return np.fromiter(hashes(), dtype=np.uint64)


def _fold(value: object) -> object:
    if isinstance(value, str):
        return re.sub(r"\s+", " ", value).strip().casefold()
    if isinstance(value, list):
        return [_fold(item) for item in value]
    if isinstance(value, dict):
        return {key: _fold(item) for key, item in value.items()}
    return value
