"""Which examples of the sets a page shows: a seeded sample, and some of every kind that one looks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.data.comparison import RowHashes, are_repeated, are_shared
from tunesmith.data.token_set import TokenSet

NUM_SHOWN = 200
_NUM_HELD_OUT = 40
_EXTREMES = 3
_OF_A_KIND = 12
_OF_A_DATASET = 5


@dataclass(frozen=True, eq=False)
class ShownSet:
    """One tokenized set, and of each of its rows: whether it repeats another, and whether another set has it too."""

    name: str
    rows_file: Path
    tokens: TokenSet
    hashes: RowHashes
    is_repeated: np.ndarray
    is_shared: np.ndarray

    @property
    def dropped(self) -> np.ndarray:
        """The rows that have no example, int64."""
        is_kept = np.zeros(len(self.hashes), dtype=bool)
        is_kept[self.tokens.rows] = True
        return np.flatnonzero(~is_kept)


@dataclass(frozen=True)
class Choice:
    """An example to show, or with `example` None a dropped row; both count from 0."""

    row: int
    example: int | None


def show_set(name: str, data_dir: Path, tokens: TokenSet, hashes: dict[str, RowHashes]) -> ShownSet:
    """Return the set with its rows compared to one another, without regard to case and white space."""
    own = hashes[name]
    others = [of_set.alike for other, of_set in hashes.items() if other != name]
    return ShownSet(
        name,
        data_dir / f"{name}.jsonl",
        tokens,
        own,
        are_repeated(own.alike),
        are_shared(own.alike, others),
    )


def share_out(num_training: int, num_validation: int = 0) -> list[int]:
    """Return how many of either set are shown; of the second none where it is empty."""
    of_validation = min(num_validation, max(_NUM_HELD_OUT, NUM_SHOWN - num_training))
    of_training = min(num_training, NUM_SHOWN - of_validation)
    return [of_training, of_validation] if num_validation else [of_training]


def choose_shown(shown: ShownSet, limit: int, seed: int) -> list[Choice]:
    """Return at most `limit` examples and dropped rows, the ones of a kind first. A pure function of its arguments."""
    chosen: dict[Choice, None] = {}
    for choice in _by_kind(shown, np.random.default_rng(seed)):
        if len(chosen) == limit:
            break
        chosen[choice] = None
    return list(chosen)


def _by_kind(shown: ShownSet, random: np.random.Generator) -> Iterator[Choice]:
    tokens = shown.tokens
    for row in _some(shown.dropped, _OF_A_KIND, random):
        yield Choice(row, None)
    by_length = np.argsort(tokens.lengths, kind="stable")
    for example in [*by_length[:_EXTREMES].tolist(), *by_length[::-1][:_EXTREMES].tolist()]:
        yield _of_example(tokens, example)
    # What is truncated may be short by now; the rows that it was made of are the longest ones.
    longest = np.argsort(-shown.hashes.sizes, kind="stable")[: 2 * _OF_A_KIND]
    repeated = _some(np.flatnonzero(shown.is_repeated), _OF_A_KIND, random)
    shared = _some(np.flatnonzero(shown.is_shared), _OF_A_KIND, random)
    for row in [*longest.tolist(), *repeated, *shared]:
        yield from _of_row(tokens, row)
    for dataset_id in np.unique(shown.hashes.dataset_ids):
        of_dataset = np.flatnonzero(tokens.dataset_ids == dataset_id)
        for example in _some(of_dataset, _OF_A_DATASET, random):
            yield _of_example(tokens, example)
    for example in _some(np.arange(tokens.num_examples), 2 * NUM_SHOWN, random):
        yield _of_example(tokens, example)


def _some(of: np.ndarray, number: int, random: np.random.Generator) -> list[int]:
    chosen: list[int] = random.permutation(of)[:number].tolist()
    return chosen


def _of_example(tokens: TokenSet, example: int) -> Choice:
    return Choice(int(tokens.rows[example]), example)


def _of_row(tokens: TokenSet, row: int) -> Iterator[Choice]:
    """Yield the first example of a row, if it has one."""
    first = int(np.searchsorted(tokens.rows, row))
    if first < tokens.num_examples and tokens.rows[first] == row:
        yield Choice(row, first)
