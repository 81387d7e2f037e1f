"""Whole numbers that gaps have made into floats: pandas knows no gap among whole numbers, so `4` becomes `4.0`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.arrow_rows import Row
from tunesmith.data.formats.base import is_missing

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

# Beyond it a float doesn't tell a whole number from the next one.
_EXACT = 2.0**53


def float_columns(schema: pyarrow.Schema) -> list[str]:
    """Return the columns of floats."""
    import pyarrow

    return [field.name for field in schema if pyarrow.types.is_floating(field.type)]


def find_gapped(batches: Iterable[pyarrow.Table | pyarrow.RecordBatch], source: str) -> list[str]:
    """Return which of the columns, of floats all, hold whole numbers and gaps alone; the log says it once."""
    whole: dict[str, bool] = {}
    gapped: set[str] = set()
    for batch in batches:
        for name in batch.schema.names:
            numbers = np.asarray(batch.column(name))
            held = numbers[~np.isnan(numbers)]
            is_whole = bool(np.all(held == np.trunc(held)) and np.all(np.abs(held) < _EXACT))
            whole[name] = whole.get(name, True) and is_whole
            if len(held) < len(numbers):
                gapped.add(name)
    found = [name for name, is_whole in whole.items() if is_whole and name in gapped]
    for name in found:
        _say(source, name)
    return found


def without_points(rows: Iterator[Row], gapped: Collection[str]) -> Iterator[Row]:
    """Yield the rows with whole numbers in these columns."""
    for row in rows:
        for name in gapped:
            row[name] = None if is_missing(row[name]) else int(row[name])
        yield row


@cache
def _say(source: str, name: str) -> None:
    logger.info(
        "%s: column `%s` holds whole numbers and gaps, which made them floats: 4.0 is read as 4", source, name
    )
