"""How much of the training each of several data sets is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config import HFDatasetConfig
from tunesmith.config.data import name_data_sets
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.token_set import TokenSet


@dataclass(frozen=True)
class Share:
    """What an epoch takes of a data set, on average: rows, examples and tokens, each times its weight.

    `row_share` and `token_share` are of all data sets together, from 0 to 1.
    """

    name: str
    weight: float
    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    row_share: float
    token_share: float


def measure_shares(tokens: TokenSet, data_sets: Sequence[HFDatasetConfig]) -> list[Share]:
    """Return the shares of the data sets in their training set, of rows of which nothing is trained without."""
    ids, number = tokens.dataset_ids, len(data_sets)
    weights = np.array([settings.weight for settings in data_sets])
    # A row may have several examples.
    begins_row = np.zeros(tokens.num_examples, dtype=bool)
    begins_row[np.unique(tokens.rows, return_index=True)[1]] = True
    columns = [
        np.bincount(ids, values, minlength=number) * weights
        for values in (begins_row, None, tokens.lengths, tokens.num_trained)
    ]
    rows, _, of_tokens, _ = columns
    shares = [column / max(1, column.sum()) for column in (rows, of_tokens)]
    return [
        Share(
            name,
            data_sets[i].weight,
            *(round(float(column[i])) for column in columns),
            *(float(share[i]) for share in shares),
        )
        for i, name in enumerate(name_data_sets(data_sets))
    ]


def describe_shares(tokens: TokenSet, data_sets: Sequence[HFDatasetConfig]) -> list[str]:
    """Return what an epoch takes of each data set, for the log; nothing where a single one is taken as it is."""
    if len(data_sets) == 1 and data_sets[0].weight == 1.0:
        return []
    return [
        f"{share.name}: an epoch takes {share.rows:,} rows ({100 * share.row_share:.1f} %) and {share.tokens:,} tokens "
        f"({100 * share.token_share:.1f} %)"
        + (f", by its weight of {share.weight:g}" if share.weight != 1.0 else "")
        for share in measure_shares(tokens, data_sets)
    ]


def check_drawn(tokens: TokenSet, data_sets: Sequence[HFDatasetConfig]) -> None:
    """Refuse a weight by which no epoch takes anything of its data set.

    Raises:
        DataError: it names the data set, and a weight that takes something.
    """
    counts = np.bincount(tokens.dataset_ids, minlength=len(data_sets)).tolist()
    for settings, num_examples in zip(data_sets, counts, strict=True):
        if num_examples and not round(num_examples * settings.weight):
            raise DataError(
                f"a `weight` of {settings.weight:g} draws none of the {num_examples:,} examples of "
                f"`{settings.dataset_name}`",
                f"give it at least {math.ceil(1000 / num_examples) / 1000:g}, or leave the data set out",
            )
