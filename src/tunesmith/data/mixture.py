"""Rows of several data sets in one file: a rendered row tells by its `dataset_id` whose it is, and so its format.

Where there is one data set, its rows say nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import RowError
from tunesmith.data.examples import Example
from tunesmith.data.formats import Findings, Prompt, RenderedRow, RowFormat, format_named

_DATASET_ID = "dataset_id"


def tag(dataset_id: int, num_datasets: int) -> dict[str, int]:
    """Return what a rendered row says of its data set."""
    return {_DATASET_ID: dataset_id} if num_datasets > 1 else {}


def dataset_of(row: RenderedRow) -> int:
    """Return the number of the row's data set."""
    return int(row.get(_DATASET_ID, 0))


def without_tag(row: dict[str, Any]) -> RenderedRow:
    """Return the row as its format has rendered it."""
    return {name: value for name, value in row.items() if name != _DATASET_ID}


def encode_rows(
    formats: Sequence[RowFormat], rows: Sequence[RenderedRow], findings: Findings
) -> Iterator[list[Example]]:
    """Yield the examples of each row; `formats` are those of the data sets. `findings` gets what is found in the rows.

    Raises:
        RowError: a row can't be encoded.
    """
    if len(formats) == 1:
        return formats[0].encode(rows, findings)
    return _encode_mixed(formats, rows, findings)


def _encode_mixed(
    formats: Sequence[RowFormat], rows: Sequence[RenderedRow], findings: Findings
) -> Iterator[list[Example]]:
    first = 0
    for dataset_id, group in groupby(rows, key=dataset_of):
        own = list(group)
        try:
            for examples in formats[dataset_id].encode(own, findings):
                yield [example._replace(dataset_id=dataset_id) for example in examples]
        except RowError as error:
            raise RowError(error.message, error.hint, first + error.index) from error
        first += len(own)


def prompt_of(formats: Sequence[RowFormat], row: RenderedRow) -> Prompt | None:
    """Return the prompt of a row; None if it asks nothing or expects nothing."""
    return formats[dataset_of(row)].prompt(row)


def recorded_formats(names: str | list[str], data_sets: Sequence[HFDatasetConfig]) -> list[RowFormat]:
    """Return the formats of a run's own rows, by the names that it has recorded.

    Raises:
        DataError: this version doesn't know one of them.
    """
    each = [names] if isinstance(names, str) else names
    return [format_named(name, settings) for name, settings in zip(each, data_sets, strict=True)]
